# Variables that training on GPUs needs, each with its reason. Sourced by train.sbatch and by
# `tools/launch.py --here`. A value that you have exported yourself is kept.

# --- Megatron ---
# Tensor parallelism hides a transfer behind a matrix product by starting it first. With one hardware
# queue, kernels start in the order of the calls; with more, the product can take the GPU first.
# Needed before Blackwell, with tensor or context parallelism.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# --- torch ---
# Packs differ in their number of images, so block sizes do too: segments that grow do not fragment.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# A collective that fails or times out ends its process, so torchrun sees it, instead of waiting on.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# Remember the last 2000 collectives of each rank: which rank hung in which one. A run that hangs
# writes them to WORK_DIR/collectives_RANK (read them with torchfrtrace); torch itself, should its own
# time-out come first, to /tmp of the node. Costs some megabytes of host memory.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# Processes of a node share its cores; eight times all cores in threads would fight over them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

# --- NCCL ---
# Name what goes wrong, and nothing else. INFO shows links and algorithms when a run is slow.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# InfiniBand waits 4 us x 2^N for an answer, 7 times: 17 s instead of NCCL's own 4 s (N = 20) outlast
# a link that comes back.
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
# Set these where a node has several networks and NCCL or gloo picks the wrong one:
#   NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0    interface of the first contact
#   NCCL_IB_HCA=mlx5                                 InfiniBand adapters to use

# --- Caches ---
# Compiled Triton kernels: on the node's own disk, since many nodes writing one folder get in each
# other's way.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$UID}
# Compute nodes often have no way out: Hugging Face libraries must not wait for one.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
