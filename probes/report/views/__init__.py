"""One module per notebook: its tables for readers, its sentence of answer, its badges.

They arrange what the probes computed and compute nothing of their own. Trap: a sentence must not say more than its
interval does; the word for a difference whose interval holds zero is "undetermined", never "the same".
"""
