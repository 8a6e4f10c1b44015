"""Read the weights of a file that torch.save wrote. Nothing in it is imported or run."""
