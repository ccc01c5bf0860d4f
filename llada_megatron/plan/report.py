"""Plans and searches for people: the verdict first, then where memory and time go, then what is assumed."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llada_megatron.config.layout import data_parallel_size
from llada_megatron.config.parameters import active_parameters, total_parameters
from llada_megatron.config.quantities import GB, amount, duration, quantity
from llada_megatron.config.schema import ClusterConfig, Config, LayoutConfig, ModelConfig, Recompute
from llada_megatron.plan.assumptions import of_switches
from llada_megatron.plan.checkpoints import HASH_GB_PER_SEC, INDEX_SEC
from llada_megatron.plan.estimate import Plan, StageTime
from llada_megatron.plan.memory import NOT_MODELLED
from llada_megatron.plan.search import Result, describe, in_runs

BAR = 40
EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")
COLOURS = ("blue", "cyan", "magenta", "green", "yellow", "red", "bright_blue", "bright_magenta", "white")


def print_plan(plan: Plan, config: Config) -> None:
    """Everything about one layout."""
    console = Console(highlight=False)
    _verdict(console, plan, config.model, config.checkpoint.every_steps)
    _memory(console, plan)
    longest = max(plan.stages, key=lambda stage: stage.hours)
    _schedule(console, plan)
    _step(console, longest)
    _traffic(console, longest)
    _effects(console, plan, longest)
    print_assumptions(console, plan, config)


def _verdict(console: Console, plan: Plan, model: ModelConfig, every_steps: int) -> None:
    fullest, usable = plan.fullest, plan.usable_bytes / GB
    word, style = ("fits", "bold green") if plan.fits else ("does not fit", "bold red")
    where = f" on {plan.cluster} ({plan.gpus} GPU{'s' * (plan.gpus > 1)})"
    console.print(Text(f"{plan.name} {word}{where}", style=style))
    total, active = total_parameters(model), active_parameters(model)
    console.print(f"  model   {total:,} parameters, {quantity(active)} of them active")
    console.print(f"  layout  {describe(plan.layout)}, dp {data_parallel_size(plan.layout)}")
    console.print(
        f"  memory  {amount(fullest.peak)} on pipeline stage {fullest.rank}, of {usable:.1f} GB"
        f" ({plan.memory_bytes / GB:.0f} less {1 - plan.usable_bytes / plan.memory_bytes:.0%} margin)"
    )
    if kept := plan.decoding:
        console.print(
            f"  decoding {amount(1000 * kept.cached_token_bytes)} of keys and values per 1,000 tokens on each"
            f" process,\n           {amount(kept.bytes)} for {kept.batch} sequences of {kept.context:,}"
        )
    console.print(f"  saves   {_saves(plan, every_steps)}")
    tokens = sum(stage.tokens for stage in plan.stages)
    cost = "" if plan.cost is None else f", cost {plan.cost:,.0f}"
    console.print(
        f"  time    {duration(plan.hours)} for {quantity(tokens)} tokens, {plan.hours * plan.gpus:,.0f}"
        f" GPU-hours{cost}"
    )
    console.print(f"  speed   {quantity(plan.tokens_per_sec)} tokens/s, MFU {plan.mfu:.1%}, estimated")


def _saves(plan: Plan, every_steps: int) -> str:
    """A sentence on checkpoints."""
    cost = plan.checkpoints
    text = f"{amount(cost.bytes)} each"
    if cost.host_bytes_per_node:
        text += f", {amount(cost.host_bytes_per_node)} of host memory per node"
    if cost.memory_bytes_per_node:
        text += f",\n          {amount(cost.memory_bytes_per_node)} per node for copies in memory"
    if cost.wait_seconds is None or cost.write_seconds is None or cost.load_seconds is None:
        return f"{text}; cluster.host_gb_per_sec and storage_gb_per_sec would tell seconds"
    text += f";\n          written in {cost.write_seconds:.0f} s, training waits {cost.wait_seconds:.1f} s"
    if every_steps:
        interval = every_steps * min(stage.step_seconds for stage in plan.stages)
        text += f" of every {interval:,.0f} ({cost.wait_seconds / interval:.1%})"
    return f"{text},\n          loaded in {cost.load_seconds:.0f} s"


def _memory(console: Console, plan: Plan) -> None:
    unit, letter = (GB, "GB") if plan.fullest.peak >= GB else (1e6, "MB")
    headers = ("stage", "layers", "params", "weights", "grads", "optim", "kept", "in flight",
               "trans.", "peak")  # fmt: skip
    table = table_of(f"Memory per pipeline stage, {letter} on its fullest process", headers)
    for rank in plan.ranks:
        parts = {name: f"{size / unit:.1f}" for name, size in rank.parts.items()}
        table.add_row(
            str(rank.rank),
            in_runs(rank.layers),
            quantity(rank.parameters.trained),
            parts["weights"],
            parts["gradients"],
            parts["optimizer"],
            parts["activations"],
            in_runs(rank.in_flight),
            parts["transient"],
            Text(f"{rank.peak / unit:.1f}", style="" if rank.peak <= plan.usable_bytes else "bold red"),
        )
    console.print(table)
    fullest = plan.fullest
    console.print(
        f"\nWhere the memory of stage {fullest.rank} goes in {fullest.stage}, {letter} and share of"
        f" {plan.memory_bytes / unit:.0f}"
    )
    sizes = {name: fullest.parts[name] for name in ("weights", "gradients", "optimizer")}
    sizes |= {f"kept: {name.replace('_', ' ')}": size for name, size in fullest.activations.items()}
    sizes["transient"] = fullest.parts["transient"]
    bars(console, {name: size / unit for name, size in sizes.items()}, plan.memory_bytes / unit, "{:.1f}")


def _schedule(console: Console, plan: Plan) -> None:
    has_lengths = len({stage.sequence_length for stage in plan.stages}) > 1
    lengths = ["L"] if has_lengths else []
    headers = ("stage", *lengths, "block", "s/step", "tokens/s", "MFU", "tokens", "hours", "GPU-hours")
    table = table_of("Time per stage of the schedule", headers, left=headers[:1])
    for stage in plan.stages:
        table.add_row(
            stage.name,
            *([str(stage.sequence_length)] if has_lengths else []),
            str(stage.block_size),
            f"{stage.step_seconds:.2f}",
            quantity(stage.tokens_per_sec),
            f"{stage.mfu:.1%}",
            quantity(stage.tokens),
            f"{stage.hours:.1f}",
            f"{stage.gpu_hours:,.0f}",
        )
    console.print(table)


KINDS = {
    "gemm": "matrix products",
    "expert gemm": "experts' products",
    "attention": "attention",
    "memory": "memory-bound",
    "gradients": "gradients, weights",
    "optimizer": "optimizer",
    "bubble": "pipeline bubble",
    "before": "passes before",
    "launches": "starts of kernels",
    "host": "host memory",
    "boundaries": "wait for boundaries",
}


def _step(console: Console, stage: StageTime) -> None:
    console.print(
        f"\nWhere a step of {stage.name} goes, seconds and share of {stage.step_seconds:.2f}"
        f" ({stage.micro_batches} micro-batches)"
    )
    seconds = {KINDS.get(name, f"messages: {name}"): part for name, part in stage.seconds.items()}
    bars(console, seconds, stage.step_seconds, "{:.2f}")
    console.print(
        f"  {quantity(stage.model_flops_per_token)}FLOP per data token,"
        f" {quantity(stage.performed_flops_per_token)}FLOP with what is recomputed"
    )
    if stage.passes_before:
        passes, fewest = stage.passes_before, stage.fewest_passes_before
        spared = f"; {fewest or 'none'} with one micro-batch per rank" if fewest < passes else ""
        console.print(
            f"  {passes} forward pass{'es' * (passes > 1)} over the batch before each step's own,"
            f" {stage.seconds['before'] / stage.step_seconds:.0%} of its time: performed, but not counted in"
            f" MFU{spared}"
        )


def _traffic(console: Console, stage: StageTime) -> None:
    if not stage.traffic:
        return
    headers = ("group", "ranks", "on a node", "GB", "seconds if nothing hid it")
    table = table_of(f"Traffic of a process in a step of {stage.name}", headers, left=headers[:1])
    for group in sorted(stage.traffic, key=lambda group: -group.seconds):
        table.add_row(
            group.group,
            str(group.ranks),
            str(group.on_node),
            f"{group.payload / GB:.2f}",
            f"{group.seconds:.2f}",
        )
    console.print(table)


EFFECTS = 6
"""Lines that the table of each kind has at most."""
WORTH = 1e-3
"""Less of a step is not shown."""


def _effects(console: Console, plan: Plan, stage: StageTime) -> None:
    """Switches that would help, turned on alone, and what those that are on are worth."""
    for is_on, title in (
        (True, "What would raise MFU most, each alone"),
        (False, "What is on already, each off alone"),
    ):
        gained = [
            (each, (stage.step_seconds - each.step_seconds) * (1 if is_on else -1))
            for each in plan.effects
            if each.is_on == is_on
        ]
        shown = sorted(
            ((each, gain) for each, gain in gained if gain > WORTH * stage.step_seconds),
            key=lambda pair: -pair[1],
        )[:EFFECTS]
        if not shown:
            continue
        headers = ("set", "s/step", "MFU", "peak GB")
        table = table_of(f"{title} ({stage.name}: {stage.mfu:.1%})", headers, left=headers[:1])
        for each, _ in shown:
            table.add_row(
                " ".join(each.overrides),
                f"{each.step_seconds:.2f}",
                f"{each.mfu:.1%}",
                Text(f"{each.peak_bytes / GB:.1f}", style="" if each.fits else "bold red"),
            )
        console.print(table)


def print_assumptions(console: Console, plan: Plan, config: Config) -> None:
    cluster = config.cluster
    derived = config.model.layer_spec == "local"
    experts = _experts(plan) if config.model.has_experts else ""
    documents = (
        "every sequence is one document"
        if plan.documents is None
        else f"documents have log-normal lengths (median {plan.documents.median_tokens:g} tokens, sigma"
        f" {plan.documents.sigma:g})"
    )
    longest = max(plan.stages, key=lambda stage: stage.hours)
    assumed = [
        f"shares of the peak as in cluster={cluster.name} ({achieved_shares(cluster)})",
        *of_switches(config, longest),
        f"{experts}{documents}",
        "transients are upper bounds; what layers keep is derived from megatron-core's local spec"
        + ("" if derived else ", for TransformerEngine an estimate"),
    ]
    if plan.checkpoints.load_seconds is not None:
        assumed.append(
            f"of checkpoints: each device copies {cluster.host_gb_per_sec:g} GB/s, a node's storage moves"
            f" {cluster.storage_gb_per_sec:g} GB/s while all ask, a thread hashes {HASH_GB_PER_SEC:g} GB/s,"
            f" the index takes {INDEX_SEC:g} s; a load in the layout that saved"
        )
    console.print("\nAssumed")
    for line in assumed:
        console.print(Padding(f"- {line}", (0, 0, 0, 2)))
    console.print(f"Not modelled: {NOT_MODELLED}; evaluation. See docs/planning.md.")


def achieved_shares(cluster: ClusterConfig) -> str:
    """What kernels and links are taken to reach of their peaks."""
    shares = {
        "matrix products": cluster.gemm_efficiency,
        "experts' products": cluster.grouped_gemm_efficiency,
        "attention": cluster.attention_efficiency,
        "memory": cluster.memory_efficiency,
        "links": cluster.link_efficiency,
    }
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share)


def _experts(plan: Plan) -> str:
    """What is reckoned with, and what memory allows."""
    text = f"the busiest experts get {plan.expert_imbalance:g} times the mean"
    if plan.largest_imbalance is not None:
        text += f" (memory holds {plan.largest_imbalance:g}: docs/experts.md)"
    return f"{text}; "


def print_search(result: Result, *, top: int) -> None:
    """The fastest layouts, and the reasons why others fall out."""
    console = Console(highlight=False)
    found, usable = result.candidates, f"{result.usable_bytes / GB:.1f} GB"
    gpus = f"{result.gpus} GPU{'s' * (result.gpus > 1)}"
    if not found:
        console.print(
            Text(
                f"No layout of {gpus} fits into {usable} each.",
                style="bold red",
            )
        )
    else:
        best = found[0]
        console.print(Text(describe(best.layout), style="bold green"))
        console.print(f"  is the fastest of {len(found)} layouts of {gpus} that fit into {usable} each:")
        console.print(f"  {' '.join(overrides(best.layout))}", soft_wrap=True)
        headers = ("", "tokens/s", "hours", "peak GB", "dp", "layout")
        table = table_of("The fastest, estimated over the whole schedule", headers, left=headers[-1:])
        for place, one in enumerate(found[:top], start=1):
            table.add_row(
                str(place),
                quantity(one.tokens_per_sec),
                f"{one.hours:.1f}",
                f"{one.peak_bytes / GB:.1f}",
                str(data_parallel_size(one.layout)),
                describe(one.layout),
            )
        console.print(table)
    console.print("\nWhat falls out, and the first of each kind (of what does not fit, the nearest)")
    for rejection in sorted(result.rejections.values(), key=lambda one: -one.count):
        console.print(f"{rejection.count:>7}  {rejection.reason}", soft_wrap=True)
        console.print(Text(f"         {rejection.example}", style="dim"), soft_wrap=True)
    console.print(
        "\nEach layout comes with the fastest recompute that fits. Times rest on assumptions that"
        " `llada plan` shows for one layout."
    )


def overrides(layout: LayoutConfig) -> list[str]:
    """A layout as overrides of the command line."""
    names = ("processes", "tp", "pp", "vpp", "cp", "ep", "etp", "micro_batch")
    words = [f"layout.{name}={getattr(layout, name)}" for name in names]
    words.append(f"layout.pipeline=[{','.join(map(str, layout.pipeline))}]")
    words.append(f"layout.recompute={layout.recompute.value}")
    if layout.recompute is Recompute.selective:
        words.append(f"layout.recompute_modules=[{','.join(layout.recompute_modules)}]")
    return words


def table_of(title: str, headers: tuple[str, ...], *, left: tuple[str, ...] = ()) -> Table:
    """An empty table; headers in `left` are aligned there."""
    table = Table(title=f"\n{title}", title_justify="left", title_style="", box=None, pad_edge=False)
    for header in headers:
        table.add_column(
            header, justify="left" if header in left else "right", no_wrap=header not in ("layout", "set")
        )
    return table


def bars(console: Console, sizes: dict[str, float], whole: float, number: str, *, width: int = 20) -> None:
    """A line per part; parts that round to nothing are left out."""
    shown = {name: size for name, size in sizes.items() if float(number.format(size)) > 0}
    for index, (name, size) in enumerate(shown.items()):
        eighths = round(8 * BAR * size / whole)
        bar = "█" * (eighths // 8) + EIGHTHS[eighths % 8]
        line = Text(f"  {name:<{width}} {number.format(size):>6} {size / whole:>4.0%}  ")
        line.append(bar, style=COLOURS[index % len(COLOURS)])
        console.print(line)
