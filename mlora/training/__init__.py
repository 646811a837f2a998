"""What users call to train adapters: fresh ones, their parameters, and the losses of a mixed batch."""
