"""DPO on pairs of the model's own replies, on a file of pairs, or on a public data set."""
