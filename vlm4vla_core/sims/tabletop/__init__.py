"""The built-in tabletop world: physics in NumPy, scripted expert, torch ray caster; nothing to download.

Version 0: simple on purpose (see `world` for what its physics leaves out).
"""
