"""Streams task vectors through methods: the only room that knows devices, dtypes, passes and workers.

The way of the data, for each piece of a tensor: the stored bytes of the base and of every expert are read; both are
widened to float32 (float64 where that is stored) and subtracted; the task vectors [T, *shape], float32 on the device,
go through the transforms and the method; `theta_0` plus the merged task vector is rounded once, to the output's dtype,
and written at its final place in the output file.

Element-wise methods take tensors in blocks small enough to stay in the processor's cache; each worker thread reads,
computes and writes its own blocks, so that reading, maths and writing overlap and memory does not grow with the
tensors. Methods that need whole matrices get them one by one, with the next one being read and the last one being
written meanwhile.
"""
