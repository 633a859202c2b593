"""Building blocks of the models: plain torch, no knowledge of data or training."""
