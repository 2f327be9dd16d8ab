"""THE table of what a recipe may name: group -> name -> "module:attr". Strings only; nothing is imported to list it."""

from __future__ import annotations

CATALOGUE: dict[str, dict[str, str]] = {
    "stage": {
        "fit": "rlx.stages.fit:Fit",
        "online": "rlx.stages.online:Online",
        "evaluate": "rlx.stages.evaluate:Evaluate",
    },
    "loss": {
        "nll": "rlx.losses.likelihood:nll",
        "entropy": "rlx.losses.likelihood:entropy",
        "policy_gradient": "rlx.losses.policy:policy_gradient",
        "clipped_surrogate": "rlx.losses.policy:clipped_surrogate",
        "kl": "rlx.losses.policy:kl",
        "bradley_terry": "rlx.losses.preference:bradley_terry",
        "dpo": "rlx.losses.preference:dpo",
        "value_mse": "rlx.losses.value:value_mse",
        "clipped_value": "rlx.losses.value:clipped_value",
    },
    "advantage": {
        "group_mean": "rlx.advantages:group_mean",
        "group_zscore": "rlx.advantages:group_zscore",
        "rloo": "rlx.advantages:rloo",
        "returns": "rlx.advantages:returns",
        "gae": "rlx.advantages:gae",
    },
    "derive": {
        "kl_penalty": "rlx.derive:kl_penalty",
        "log_ratio": "rlx.derive:log_ratio",
        "lambda_returns": "rlx.derive:lambda_returns",
    },
    "watch": {
        "clip_fraction": "rlx.losses.watch:clip_fraction",
        "approx_kl": "rlx.losses.watch:approx_kl",
        "ref_kl": "rlx.losses.watch:ref_kl",
        "entropy": "rlx.losses.watch:entropy_value",
        "pair_accuracy": "rlx.losses.watch:pair_accuracy",
        "dpo_accuracy": "rlx.losses.watch:dpo_accuracy",
        "dpo_margin": "rlx.losses.watch:dpo_margin",
    },
    "reduce": {
        "token_mean": "rlx.reduce:token_mean",
        "seq_mean": "rlx.reduce:seq_mean",
        "seq_sum": "rlx.reduce:seq_sum",
        "constant": "rlx.reduce:constant",
    },
    "reward": {
        "verifier": "rlx.rewards.rules:verifier",
        "answer_match": "rlx.rewards.rules:answer_match",
        "format": "rlx.rewards.rules:format",
        "soft_overlong": "rlx.rewards.rules:soft_overlong",
        "length": "rlx.rewards.rules:length",
        "constant": "rlx.rewards.rules:constant",
        "reward_model": "rlx.rewards.model:reward_model",
        "env": "rlx.rewards.env:env",
    },
    "keep": {
        "mixed_groups": "rlx.filters:mixed_groups",
        "correct": "rlx.filters:correct",
        "untruncated": "rlx.filters:untruncated",
    },
    "metric": {
        "accuracy": "rlx.metrics:accuracy",
        "sampled_accuracy": "rlx.metrics:sampled_accuracy",
        "mean_reward": "rlx.metrics:mean_reward",
        "pass": "rlx.metrics:pass_at",
        "maj": "rlx.metrics:maj_at",
        "length": "rlx.metrics:length",
        "wrong_length": "rlx.metrics:wrong_length",
        "excess_length": "rlx.metrics:excess_length",
        "truncated": "rlx.metrics:truncated",
    },
    "sampler": {
        "plain": "rlx.rollout.samplers:plain",
    },
    "task": {
        "arithmetic": "rlx.data.arithmetic:arithmetic",
        "gsm8k": "rlx.data.gsm8k:gsm8k",
        "math": "rlx.data.mathematics:math",
        "gsm8k_math": "rlx.data.mathematics:gsm8k_math",
        "dapo_math": "rlx.data.mathematics:dapo_math",
        "tldr": "rlx.data.tldr:tldr",
        "files": "rlx.data.files:files",
    },
    "data": {
        "jsonl": "rlx.data.files:jsonl",
        "parquet": "rlx.data.files:parquet",
        "csv": "rlx.data.files:csv",
        "hub": "rlx.data.files:hub",
    },
    "model": {
        "tiny": "rlx.models.load:tiny",
        "pretrained": "rlx.models.load:pretrained",
    },
    "optim": {
        "adamw": "rlx.optim:adamw",
    },
    "llm": {},
}
