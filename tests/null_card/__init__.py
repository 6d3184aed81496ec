"""The learner on a card that computes nothing, where there is none: does its CUDA path run, and its kernels compile?

Libraries of ours stand in for CUDA's runtime and driver. Memory is allocated as on a card, Triton compiles for the
capability that is asked for, and kernels return at once. So a wrong argument, a kernel that does not fit, a wait for
the device and a peak of memory show, and no number that a kernel should have computed.
"""
