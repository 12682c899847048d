"""A small configuration of every method of peft that a causal LM can be given, and of LoRA's options."""

from __future__ import annotations

from typing import Any

TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
VIRTUAL: dict[str, Any] = {"num_virtual_tokens": 4}
LORA = TARGETS | {"r": 4}

# by peft_type
METHODS: dict[str, dict[str, Any]] = {
    "ADALORA": TARGETS | {"total_step": 10},
    "ADAMSS": TARGETS | {"r": 16},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "BEFT": TARGETS,
    "BOFT": TARGETS | {"boft_block_size": 8},
    "C3A": TARGETS | {"block_size": 32},
    "CARTRIDGE": VIRTUAL,
    "CPT": {"cpt_token_ids": [0, 1], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "DEFT": TARGETS,
    "DELORA": TARGETS,
    "FOURIERFT": TARGETS | {"n_frequency": 16},
    "FROD": TARGETS | {"progressbar": False},
    "GLORA": TARGETS,
    "GRALORA": TARGETS,
    "HIRA": TARGETS,
    "HRA": TARGETS | {"r": 4},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LILY": TARGETS,
    "LN_TUNING": {},
    "LOHA": TARGETS,
    "LOKR": TARGETS,
    "LORA": LORA,
    "MISS": TARGETS,
    "MULTITASK_PROMPT_TUNING": VIRTUAL | {"num_tasks": 3},
    "OFT": TARGETS | {"oft_block_size": 8},
    "OSF": TARGETS,
    "PEANUT": TARGETS,
    "POLY": TARGETS,
    "PREFIX_TUNING": VIRTUAL,
    "PROMPT_TUNING": VIRTUAL,
    "PSOFT": TARGETS | {"psoft_svd": "lowrank"},
    "PVERA": TARGETS | {"r": 8},
    "P_TUNING": VIRTUAL | {"encoder_hidden_size": 32},
    "RANDLORA": TARGETS | {"r": 8},
    "ROAD": TARGETS,
    "SHADOW": {"shadow_dropout": 0.0},
    "SHIRA": TARGETS | {"r": 4},
    "SUPERTUNING": TARGETS,
    "TINYLORA": TARGETS,
    "TRAINABLE_TOKENS": {"token_indices": [0, 1]},
    "UNILORA": TARGETS,
    "VBLORA": TARGETS | {"vector_length": 32, "num_vectors": 8},
    "VERA": TARGETS | {"r": 8},
    "WAVEFT": TARGETS | {"n_frequency": 64},
}

# of LoRA: each initialisation and each variant
OPTIONS: dict[str, dict[str, Any]] = {
    **{f"init {init}": {"init_lora_weights": init} for init in ("gaussian", "olora", "orthogonal", "mica")},
    "init pissa": {"init_lora_weights": "pissa"},
    "init pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "init eva": {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "layers": {"layers_to_transform": [1]},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [0, 1, 2]},
    "parameters": {"target_modules": None, "target_parameters": ["mlp.down_proj.weight"]},
    "bias": {"lora_bias": True},
    "replication": {"layer_replication": [[0, 2], [0, 2]]},
    "invoked": {"alora_invocation_tokens": [1, 2]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head"]},
    "all linear": {"target_modules": "all-linear"},
    "velora": {"velora_config": {}},
    "monteclora": {"monteclora_config": {}},
    "kasa": {"kasa_config": {}},
    "blocks": {
        "use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}
    },
    "runtime": {"use_dora": True, "runtime_config": {"ephemeral_gpu_offload": True}},
}
# of other methods
VARIANTS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING text": VIRTUAL
    | {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "Say it well:",
        "tokenizer_name_or_path": "gpt2",
    },
    "PREFIX_TUNING projection": VIRTUAL | {"prefix_projection": True, "encoder_hidden_size": 32},
    "MISS bat": TARGETS | {"init_weights": "bat", "r": 8},
    "HRA gs": TARGETS | {"apply_GS": True, "r": 4},
    "OFT coft": TARGETS | {"oft_block_size": 8, "coft": True},
    "LOKR both": TARGETS | {"decompose_both": True},
    "VERA noproj": TARGETS | {"r": 8, "save_projection": False},
}

CASES: dict[str, dict[str, Any]] = {
    **{name: {"peft_type": name} | values for name, values in METHODS.items()},
    **{f"LORA {name}": {"peft_type": "LORA"} | LORA | values for name, values in OPTIONS.items()},
    **{name: {"peft_type": name.partition(" ")[0]} | values for name, values in VARIANTS.items()},
}
for case in CASES.values():
    case["task_type"] = "CAUSAL_LM"
