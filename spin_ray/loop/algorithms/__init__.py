"""The family: what an iteration samples, how its pairs are made, which loss they feed; one algorithm a file."""
