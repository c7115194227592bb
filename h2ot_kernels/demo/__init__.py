"""The main job, `python -m h2ot_kernels demo`: see `job.run`. The comparisons in it are those that bench times, too."""
