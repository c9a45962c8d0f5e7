"""Input statistics of linear layers: a model and samples in, Gram matrices and curvature files out."""
