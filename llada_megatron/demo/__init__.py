"""The verb `demo`: the whole pipeline on this machine, from a small model of its own or a pretrained one."""
