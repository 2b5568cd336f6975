"""Stand-ins for a GPU host and for NVIDIA's images, none of which can be had here: tests/test_stand_in_gpu.py."""
