"""Write the few-kB checkpoints that every later version has to load; run once for a new format or config version.

    python tests/make_checkpoints.py NAME

The folder `tests/checkpoints/<NAME>` is committed and never written again.
"""

import sys
from pathlib import Path

import torch
from transformers import ConvNextConfig, ConvNextForImageClassification, LlamaConfig, LlamaForCausalLM

from hf_lowrank import LowRankConfig, WeightedBasesLinear, factorize, fold_order, prune_channels


OPTIONS = {"method": "svd", "param_ratio": 0.5, "rank_multiple": 1}
TOKENS = [{"input_ids": torch.arange(8)[None]}]
JOINT = {"name": "basis_sharing", "joint_groups": [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]}
DICTIONARIES = {"name": "compot", "joint_groups": JOINT["joint_groups"], "rho": 1.25}
RECIPES = {
    "low_rank_v1": {**OPTIONS, "format": "low_rank"},
    "pivoted_v1": {**OPTIONS, "format": "pivoted"},
    # Layers without an order beside others that have one.
    "pivoted_v1_folded": {**OPTIONS, "format": "pivoted"},
    # Convolutions, with groups and without, beside linears.
    "low_rank_v1_conv": {**OPTIONS, "target_modules": "all-layers", "rank_pattern": {"dwconv": 1}},
    # Layers with a bias where the architecture has none.
    "low_rank_v1_bias": {**OPTIONS, "method": "feature_pca", "calibration": TOKENS},
    # Groups, and layers that share with none.
    "shared_basis_v1": {**OPTIONS, "method": JOINT, "format": "shared_basis", "calibration": TOKENS},
    "sparse_low_rank_v1": {**OPTIONS, "method": {"name": "sparse_low_rank", "density": 0.1}},
    # Factors that count otherwise than as they stand.
    "sparse_low_rank_v1_scaled": {**OPTIONS, "method": {"name": "sltrain", "density": 0.1, "alpha": 3}},
    "dense_sparse_v1": {"method": {"name": "dsformer", "density": 0.5}, "rank": 3},
    "dense_sparse_v1_blocks": {"method": {"name": "dsformer", "density": 0.5, "blocks": 2}, "rank": 2},
    # Levels that are applied as they stand, and others whose matrix is formed.
    "multi_resolution_v1": {"method": {"name": "multi_resolution", "shares": [0.4, 0.3, 0.3]}, "rank": 2},
    "hybrid_rows_v1": {**OPTIONS, "method": "hybrid"},
    # Free rows first, and no order.
    "hybrid_rows_v1_scratch": {**OPTIONS, "method": {"name": "hybrid", "lower_rank": 2, "from_scratch": True}},
    # Narrower than the architecture says: no factors, but channels pruned.
    "dense_v1": None,
    # Chains over modes, of which one size is padded; and two factors as a chain.
    "tensor_train_v1": {**OPTIONS, "method": {"name": "tensor_train", "cores": 3, "in_shape": {12: [2, 3, 3]}}},
    "tensor_train_v1_factors": {**OPTIONS, "format": "tensor_train"},
    # One dictionary for several layers, atoms beyond the rows of one of them, masks.
    "dense_sparse_v1_shared": {"method": DICTIONARIES, "rank": 5, "calibration": TOKENS},
    # In the middle of a run: a basis is out, and others are added.
    "weighted_bases_v1": {**OPTIONS, "format": "weighted_bases"},
}
INPUTS = {
    "input_ids": torch.tensor([[3, 1, 4, 1, 5]]),
    "pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).sin().view(1, 3, 16, 16),
}


def make_dense(name):
    """The model that a checkpoint is made from."""
    if name.endswith("_conv"):
        config = ConvNextConfig(
            hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=4, num_labels=3, num_channels=3
        )
        return ConvNextForImageClassification(config).eval()
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def logits_of(model):
    """What a checkpoint has to give for the fixed input of its kind."""
    with torch.no_grad():
        return model(**{model.main_input_name: INPUTS[model.main_input_name]}).logits


def main(name):
    """Write one checkpoint with the logits it has to give."""
    folder = Path(__file__).parent / "checkpoints" / name
    if folder.exists():
        raise SystemExit(f"{folder} exists; checkpoints are never overwritten")
    torch.manual_seed(0)
    model = make_dense(name)
    if RECIPES[name] is None:
        prune_channels(model, param_ratio=0.5, calibration=TOKENS)
    else:
        factorize(model, LowRankConfig(**RECIPES[name]))
    if name.endswith("_folded") and fold_order(model, TOKENS[0]) == 0:
        raise SystemExit("no layer could be folded")
    if name.endswith("_scaled"):
        for parameter in (p for n, p in model.named_parameters() if n.endswith(".left")):
            torch.nn.init.normal_(parameter, std=0.1)
    for layer in model.modules():
        if isinstance(layer, WeightedBasesLinear):
            layer.scale.data[0] = 0
            layer.add_bases(2, torch.Generator().manual_seed(1))
            torch.nn.init.normal_(layer.added_left.weight, std=0.1)
    model.save_pretrained(folder)
    logits = logits_of(model)
    (folder / "logits.txt").write_text("\n".join(str(v) for v in logits.flatten().tolist()) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
