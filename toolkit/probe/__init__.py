"""`toolkit probe`: comparison of pretrained backbones on the user's data, by heads trained on their features."""
