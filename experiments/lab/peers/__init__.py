"""Comparison of distillation with other libraries (TRL's GKD and google-tunix) on one task and one machine.

Each contender (`ours`, `tunix_logit`, `trl_gkd`) runs in its own process, reads the task from a folder and writes its
measurements as JSON. The other libraries have their own environment (`requirements.txt`, `make peers-env`); the modules
of this package that they import need only NumPy.
"""
