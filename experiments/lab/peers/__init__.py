"""Distillation against peers: TRL's GKD, google-tunix and this toolkit, on one task and one machine, in one run.

Each contender is a process of its own (`ours`, `tunix_logit`, `trl_gkd`), which reads the task from a folder and writes
what it took as JSON. The peers run in an environment of their own (`requirements.txt`, `make peers-env`); what they
import of this package needs numpy alone.
"""
