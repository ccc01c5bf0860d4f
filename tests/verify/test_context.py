"""What `llada verify context` reports, counted from collectives of real processes."""

import json

import pytest

from llada_megatron.cli import main
from llada_megatron.verify import context


@pytest.mark.parametrize("cp", [2, 4])
def test_bytes_are_those_of_clean_keys_and_half_of_the_naive_scheme(cp):
    length, kv_heads, head_dim = 1024, 2, 16
    report = context.check(
        [0, 100, 400, length],
        block_size=32,
        block_grid="sequence",
        cp=cp,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )
    key_and_value_bytes = 2 * kv_heads * head_dim * 2
    forward_and_backward = 2
    received = length * (cp - 1) // cp * key_and_value_bytes * forward_and_backward
    assert report.bytes_counted == received
    assert report.bytes_naive == 2 * received
    assert report.tokens_per_rank == [length // cp] * cp
    assert report.work_max_over_mean <= 1.02 and report.halo_tokens == 0


def test_the_command_prints_the_figures_and_writes_them(tmp_path, capsys):
    file = tmp_path / "context.json"
    drawn = ["--lognormal", "4,1,0", "--length", "512", "--block-size", "128", "--cp", "2"]
    assert main(["verify", "context", *drawn, "--kv-heads", "1", "--head-dim", "8", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["tokens_per_rank"] == [256, 256] and written["length"] == 512
    shown = capsys.readouterr().out
    assert f"bytes_counted        {written['bytes_counted']}" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--docs", "100,x", "--cp", "2"], "--docs 100,x: give numbers with commas between them"),
        (["--docs", "100,101", "--cp", "2"], "201 tokens cannot be split evenly over 2 ranks"),
        (["--docs", "100,0,100", "--cp", "2"], "must rise strictly"),
        (["--lognormal", "6,1,0", "--cp", "2"], "--lognormal needs --length"),
        (["--lognormal", "6,1", "--length", "512", "--cp", "2"], "give 3 numbers"),
        (["--docs", "16", "--cp", "2"], "block_size must be from 1 to the 16 tokens, got 32"),
        (["--docs", "64", "--cp", "0"], "--cp 0"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, message, capsys):
    assert main(["verify", "context", *arguments, "--block-size", "32"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
