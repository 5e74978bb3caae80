"""`toolkit probe`: comparison of pretrained backbones on the user's data, by simple heads on their features."""
