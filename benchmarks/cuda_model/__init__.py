"""A CUDA step without a GPU: its launches, the code each compiles to, and a lower bound for the time of its parts.

- driver.py     a stand-in for Triton's driver: launches go through Triton's own launch code and end before the device
- pretend.py    meta tensors that behave as tensors of a CUDA device do
- recorder.py   every launch of a step, with bytes, operations, grid and specialisation
- steps.py      the steps that are recorded: training, sampling, and the benchmarks' ops
- compiler.py   compiles recorded variants in processes of their own, into Triton's cache
- cards.py      what is known and what is assumed of the GPUs
- roofline.py   the time of a step's parts on a GPU
- host.py       the host's time, measured with launches that do nothing
"""
