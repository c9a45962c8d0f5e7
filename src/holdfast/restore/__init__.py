"""`holdfast restore`: a tuned model's refusals and skills back, to a budget, with the least edit that meets it."""
