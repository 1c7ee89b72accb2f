"""The built-in tabletop world: physics in NumPy, scripted expert, torch ray caster; nothing to download.

Simple on purpose: `world` says what its physics leaves out.
"""
