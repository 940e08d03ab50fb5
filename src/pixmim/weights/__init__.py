"""Read and write weights of pixmim and of other projects.

safe_load     read a checkpoint file as data, without running any of it
detect        detect which project's model it contains; returns `Weights`, the value that the modules below share
formats       the projects: a table of keys for each (`key_map`), to rename tensors in both directions
infer_config  infer the model's configuration from shapes, settings in the file, and hints
adapt         interpolate position tables for another image size; check that weights and model match
load          a model that is ready to use: from a run, a file or timm
save          pixmim's own files
"""
