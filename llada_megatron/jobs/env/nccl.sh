# shellcheck shell=bash
# NCCL's variables for our layouts; sourced by the batch script. What the site or the user has set stays.
# Sources: the NCCL user guide's page on environment variables, PyTorch's on ProcessGroupNCCL, and
# megatron-core 0.19.2 where a file is named. None of it was tried on a GPU here.

# Warnings and errors, nothing else: the guide's minimum for production. Look closer with INFO.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# layout.tp > 1 turns on sequence parallelism, whose messages must be queued before the product that hides them:
# megatron/core/tensor_parallel/layers.py relies on one hardware queue for that. Blackwell needs it no more
# (megatron/training/arguments.py); there it does no harm that we know of.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Left to NCCL, and to the site file where NCCL chooses wrongly:
#   NCCL_SOCKET_IFNAME  the interface for its first contact. NCCL prefers names that begin with ib and avoids lo and
#                       docker; a site whose nodes have several networks names one, for example =eno1.
#   NCCL_IB_HCA         the adapters for data, where some of a node's are for storage.
#   NCCL_IB_TIMEOUT     on very large networks, when the log says IBV_WC_RETRY_EXC_ERR (error 12).
#   NCCL_ALGO           Ring where precision.deterministic=true (runtime/device.py), else NCCL takes the fastest.
#   NCCL_NET_PLUGIN     a cloud's own network, such as EFA: its image or module sets it.
