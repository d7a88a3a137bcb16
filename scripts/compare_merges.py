"""Compare both merges of a QLoRA adapter, into the original and the dequantized weights, with the trained model.

    python scripts/compare_merges.py --run runs/qlora

--run is the folder of a finished run with quantization.bits=4 and evaluation rows. Prints loss and exact match on these
rows for the 4-bit base + adapter and for both merged models. For the merged models it also prints the difference from
the 4-bit base + adapter: of the logits relative to their spread, the KL divergence of the next token in nats, and the
share of positions with the same most likely token.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from lora_accel import merge_adapter, read_config
from lora_accel.console import silence_libraries
from lora_accel.inference.evaluation import evaluate
from lora_accel.merging.verification import compare, logits_of, logits_of_folder, token_ids
from lora_accel.model.base import load_base_model
from lora_accel.saving.attach import load_adapter


def main() -> None:
    """Merge both ways and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, metavar="DIR")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    silence_libraries()
    config, adapter = read_config(args.run / "config.yaml", []), args.run / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = load_adapter(load_base_model(config.model, config.quantization), adapter)
    rows = token_ids(tokenizer, model.config.vocab_size)
    reference = logits_of(model, rows)
    del model
    lines = ["| | loss | exact match | max logit difference | mean | KL, nats | same top-1 token |", "| --- " * 7 + "|"]
    with tempfile.TemporaryDirectory(prefix="compare-merges-") as folder:
        for number, weights in enumerate(("original", "dequantized")):
            out = Path(folder) / weights
            merge_adapter(adapter, out, base_weights=weights)
            scores = evaluate(config, adapters=[adapter], merged=out, max_new_tokens=args.max_new_tokens)
            base, both, merged = scores
            if number == 0:
                lines += [
                    f"| 4-bit {score.name} | {score.eval_loss:.4f} | {score.exact_match} | | | | |"
                    for score in (base, both)
                ]
            agreement = compare(reference, logits_of_folder(out, rows), torch.bfloat16)
            lines.append(
                f"| merged, {weights} | {merged.eval_loss:.4f} | {merged.exact_match} | {agreement.moved:.3f} | "
                f"{agreement.mean_moved:.4f} | {agreement.kl:.5f} | {agreement.top1:.1%} |"
            )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
