"""Writing a recipe for a data set: inspect a sample of the images and the machine, choose settings by rules, and write
TOML with the reason for each choice.

Imports torch only on a machine with a GPU, or for a data set of torchvision.
"""
