"""
The methods that --method names, one file a family.

Begin with registry.py: what a method is, what it reads and fixes, how it makes model and optimizer.
galore.py registers GaLore and Q-GaLore as qgalore.py has them. fira.py, muon.py, apollo.py,
natural_galore.py and loqt.py are its sisters: what each does otherwise with a gradient.
full_rank.py and lora.py train without a projection, welore.py factors; after_backward.py is their
optimizer. A new file that registers a method is found by itself; docs/methods.md shows one of ten
lines.
"""
