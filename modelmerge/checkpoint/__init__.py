"""Files in, files out: references, headers, tensors, digests, shards, cards."""
