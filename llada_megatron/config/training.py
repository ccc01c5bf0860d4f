"""What the training loop does besides learning: what it leaves out, watches and waits for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from llada_megatron.config.choices import BadSamples, CudaGraphPart
from llada_megatron.config.ranges import Amount, Count, Decay, Range, Seconds, Text, span


@dataclass
class TrainingConfig:
    """Limits of the loop."""

    steps: Count = 0
    """Stop after this many steps; 0: the schedule alone decides."""
    max_skipped_steps: Count = 10
    """Steps with a non-finite loss or gradient are skipped; past this many in a window the run stops."""
    bad_samples: BadSamples = BadSamples.refuse
    """Of samples with the mask token or an id outside the vocabulary: `refuse` ends the run and names the
    document; `skip` learns nothing from the sample, on every rank alike, and records it."""
    max_skipped_samples: Count = 100
    """Of `skip`: past this many in a window the run stops."""
    freeze: list[Text] = field(default_factory=list)
    """Parameters that stay as they are, by patterns of their names in a checkpoint: ["*.router.*"]."""
    skip_window_steps: Count = 1000
    """Steps in which max_skipped_steps and max_skipped_samples count; 0: the whole run."""
    max_rollbacks: Count = 0
    """So many times a run does not stop past max_skipped_steps, but goes back to the newest good checkpoint
    from before those steps, and passes over the samples since then (training/rollback.py)."""
    max_loss_over_median: Amount = 0.0
    """A step whose loss is more than so many times its median over the stage's last spike_window_steps is
    skipped and recorded, as one that is not finite; 0: never."""
    max_grad_norm_over_median: Amount = 0.0
    """Likewise for the norm of the gradient before it is clipped."""
    spike_window_steps: Annotated[int, Range(at_least=1, at_most=10_000)] = 128
    """Until a stage has so many steps none of them is a spike."""
    figures_every_steps: Count = 0
    """Record norms of gradients, weights and activations, and figures of the routers, by layer, and the
    head's largest logit, in every Nth step (docs/report.md); 0: never."""
    expert_rows_alarm: Amount = 2.0
    """Say it, and record an event, when a rank's experts get more than so many times their mean of a
    micro-batch's rows, which is what their memory follows (docs/experts.md); 0: never."""
    ema_decay: Decay = 0.0
    """Keep a moving average of the weights, which moves by 1 - ema_decay of the difference in each step, in
    checkpoints beside them (`llada checkpoint average`); 0: none."""
    skip_samples: list[Annotated[str, span]] = field(default_factory=list)
    """Global samples to learn nothing from, `4000-4095` or `4000`: a step that holds one is passed over."""
    collective_timeout_sec: Annotated[float, Range(at_least=1, at_most=1e9)] = 600.0
    """How long a rank waits for the others in one message, and in a save.

    This and the next two are raised, with a line that says so, where a save of the run has taken more than
    half as long (guard/timeouts.py)."""
    hang_timeout_sec: Seconds = 1800.0
    """A process without progress for so long leaves its stacks in run.dir/stacks and ends with exit code 1.

    The longest step, evaluation or save must fit. 0: never."""
    stop_deadline_sec: Seconds = 300.0
    """From a signal to the end of the process, checkpoint included; past it the same happens. 0: no limit."""
    threads: Annotated[int, Range(at_least=0, at_most=4096)] = 0
    """CPU threads per process; 0: its share of its node's cores, as the process may use them."""
    bind_cores: bool = True
    """On CUDA, keep each process to its share of the cores beside its device."""
    record_memory: bool = False
    """On CUDA, keep the stack of every allocation for the snapshot of a step that runs out of memory."""
    collect_garbage_every_steps: Count = 50
    """Python's garbage is collected after every Nth step, on all processes at once; 0: when Python likes."""
    cuda_graphs: list[CudaGraphPart] = field(default_factory=list)
    """Capture these parts of a layer as CUDA graphs, which a host starts at once; empty: none."""
    preflight: bool = False
    """Check every node before the model is built: clock, disk, products, messages (guard/preflight.py)."""
    straggler_every_steps: Count = 0
    """Compare the ranks' times in every Nth step and name slow ones (guard/stragglers.py); 0: never."""
