"""Reports about runs: status, page, model card, trackers, benchmarks, judgements."""
