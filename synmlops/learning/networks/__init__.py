"""Networks by name: image patch in, logits out."""
