"""One file = one edit of a layer: tensors of one layer in, tensors out."""
