"""A recipe for data: look at a sample of them and at the machine, choose by rules, write TOML with a reason per choice.

Imports torch only on a machine with a GPU, or for a data set of torchvision.
"""
