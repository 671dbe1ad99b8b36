"""Files as users of Axolotl and LLaMA-Factory have them, and what must become of each.

`expected` are keys of the recipe, `changing` keys of the file that a note must tell of because the
recipe trains another thing, `unchanged` keys that have no counterpart and need none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shape:
    text: str
    expected: dict[str, Any]
    changing: set[str] = field(default_factory=set)
    unchanged: set[str] = field(default_factory=set)
    world_size: int | None = None
    refused: tuple[str, ...] = ()
    """Keys of the recipe that cannot be right here, such as files that do not exist."""


SMALL = "base_model: HuggingFaceTB/SmolLM2-135M\nlearning_rate: 1e-4\n"

AXOLOTL = {
    "full fine-tune of chats over 8 GPUs with ZeRO": Shape(
        """\
base_model: meta-llama/Llama-3.1-8B
plugins:
  - axolotl.integrations.liger.LigerPlugin
liger_rope: true
liger_rms_norm: true
chat_template: llama3
datasets:
  - path: mlabonne/FineTome-100k
    type: chat_template
    split: train[:20%]
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
val_set_size: 0.02
output_dir: ./outputs/out
sequence_len: 8192
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-5
bf16: auto
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
logging_steps: 1
flash_attention: true
warmup_steps: 100
evals_per_epoch: 2
saves_per_epoch: 1
deepspeed: ds.json
weight_decay: 0.1
special_tokens: {pad_token: "<|end_of_text|>"}
""",
        {
            "model.name": "meta-llama/Llama-3.1-8B",
            "model.dtype": "bfloat16",
            "model.attn_implementation": "flash_attention_2",
            "tokenizer.chat_template": "llama3",
            "tokenizer.pad_token": "<|end_of_text|>",
            "data.format": "chat",
            "data.columns": {"messages": "conversations"},
            "data.train": {"path": "mlabonne/FineTome-100k", "split": "train[:20%]"},
            "data.holdout": 0.02,
            "data.max_length": 8192,
            "data.too_long": "drop",
            "train.effective_batch_size": 64,
            "train.per_device_train_batch_size": 2,
            "train.num_train_epochs": 2,
            "train.optim": "paged_adamw_8bit",
            "train.learning_rate": 2e-5,
            "train.lr_scheduler_type": "cosine",
            "train.warmup_steps": 100,
            "train.bf16": True,
            "train.activation_checkpointing": True,
            "train.eval_steps": 0.25,
            "train.save_strategy": "epoch",
            "train.use_liger_kernel": True,
            "train.deepspeed": {"zero_optimization": {"stage": 2}},
            "output.dir": "./outputs/out",
        },
        world_size=8,
    ),
    "lora with packing and W&B": Shape(
        """\
base_model: NousResearch/Meta-Llama-3-8B
load_in_8bit: true
adapter: lora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
lora_modules_to_save: [embed_tokens, lm_head]
datasets: [{path: mhenrichsen/alpaca_2k_test, type: alpaca}]
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 4
learning_rate: 0.0002
bf16: true
wandb_project: llamas
wandb_entity: us
wandb_name: first
wandb_watch: all
""",
        {
            "peft": {
                "r": 32,
                "alpha": 16,
                "dropout": 0.05,
                "target_modules": ["q_proj", "v_proj"],
                "modules_to_save": ["embed_tokens", "lm_head"],
                "method": "lora",
            },
            "data.format": "instruction",
            "train.tokens_per_update": 2 * 4 * 4096,
            "train.max_tokens_per_micro_batch": 8192,
            "train.lr_scheduler_type": "cosine",
            "train.warmup_steps": 0.03,
            "train.report_to": ["wandb"],
            "wandb": {"project": "llamas", "entity": "us", "name": "first"},
        },
        changing={"load_in_8bit", "sample_packing", "datasets[0].type"},
        unchanged={"pad_to_sequence_len", "wandb_watch"},
    ),
    "qlora on all linear layers": Shape(
        SMALL
        + """\
load_in_4bit: true
adapter: qlora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
datasets:
  - path: openai/gsm8k
    name: main
    type: {field_instruction: question, field_output: answer}
micro_batch_size: 4
max_steps: 60
num_epochs: 3
optimizer: adamw_bnb_8bit
fp16: true
strict: false
""",
        {
            "peft": {"r": 8, "alpha": 16, "method": "qlora"},
            "data.train": {"path": "openai/gsm8k", "name": "main"},
            "data.columns": {"instruction": "question", "output": "answer"},
            "train.max_steps": 60,
            "train.fp16": True,
            "model.dtype": "float32",
        },
        changing={"fp16"},
    ),
    "dora and an older optimizer": Shape(
        SMALL
        + """\
adapter: lora
peft_use_dora: true
peft_use_rslora: true
lora_r: 4
lora_alpha: 8
optimizer: lion_pytorch
optim_args: {foo: 1}
datasets: [{path: a/b, type: sharegpt}]
""",
        {
            "peft": {"method": "dora", "r": 4, "alpha": 8, "options": {"use_rslora": True}},
            "data.columns": {"messages": "conversations"},
            "train.num_train_epochs": 1,
            "model.dtype": "bfloat16",
            "train.bf16": True,
        },
        changing={"optimizer", "optim_args"},
    ),
    "pairs with LoRA+": Shape(
        SMALL
        + """\
rl: ipo
rl_beta: 0.2
adapter: lora
loraplus_lr_ratio: 16
ddp_find_unused_parameters: true
datasets:
  - {path: a/b, type: {field_prompt: question, field_chosen: better, field_rejected: rejected}}
""",
        {
            "model.task": "dpo",
            "data.format": "preference",
            "data.columns": {"prompt": "question", "chosen": "better"},
            "dpo": {"beta": 0.2, "loss_type": ["ipo"]},
            "peft": {"method": "lora", "loraplus_ratio": 16},
        },
        unchanged={"ddp_find_unused_parameters"},
    ),
    "rewards, of some parameters": Shape(
        SMALL
        + """\
reward_model: true
optimizer: muon
unfrozen_parameters: ["layers.1[0-9]", "score"]
datasets: [{path: a/b}]
""",
        {
            "model.task": "reward",
            "model.unfrozen_parameters": ["layers.1[0-9]", "score"],
            "data.format": "preference",
            "train.optim": "muon",
        },
        changing={"datasets[0].type"},
    ),
    "several sets of several formats": Shape(
        SMALL
        + """\
datasets:
  - {path: a/b, type: chat_template}
  - path: json
    data_files: [mine.jsonl, other.jsonl]
    ds_type: json
    type: completion
    field: body
  - {path: mine.jsonl, type: "alpaca:phi", shards: 10}
test_datasets: [{path: a/b, split: test, type: chat_template}]
shuffle_merged_datasets: true
""",
        {
            "data.train": [
                {"path": "a/b", "format": "chat"},
                {"path": "./mine.jsonl", "format": "text", "columns": {"text": "body"}},
                {"path": "other.jsonl", "format": "text", "columns": {"text": "body"}},
                {"path": "./mine.jsonl", "format": "instruction"},
            ],
            "data.eval": {"path": "a/b", "split": "test", "format": "chat"},
        },
        changing={"datasets", "datasets[2].type", "datasets[2].shards"},
        unchanged={"shuffle_merged_datasets"},
        refused=("data.train[2].path",),
    ),
    "roles, ends of turns, a template of one's own": Shape(
        SMALL
        + """\
chat_template: jinja
chat_template_jinja: "{% for m in messages %}{{ m.content }}{% endfor %}"
datasets:
  - path: a/b
    type: chat_template
    roles_to_train: [gpt, human]
    train_on_eos: none
    message_field_role: speaker
    roles: {assistant: [narrator]}
train_on_inputs: false
special_tokens: {eos_token: "<|im_end|>", bos_token: "<s>"}
tokens: ["<|im_start|>"]
""",
        {
            "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
            "tokenizer.eos_token": "<|im_end|>",
            "tokenizer.add_tokens": ["<|im_start|>"],
            "data.roles_to_train": ["assistant", "user"],
        },
        changing={
            "datasets[0].train_on_eos",
            "datasets[0]",
            "datasets[0].roles",
            "special_tokens.bos_token",
        },
    ),
    "inputs are trained, too": Shape(
        SMALL + "train_on_inputs: true\nchat_template: alpaca\n"
        "datasets: [{path: a/b, type: chat_template}]\n",
        {"data.roles_to_train": ["system", "user", "assistant"]},
        changing={"train_on_inputs", "chat_template"},
    ),
    "pretraining from a stream": Shape(
        SMALL
        + """\
pretraining_dataset:
  - path: HuggingFaceFW/fineweb-edu
    name: sample-10BT
    split: train
    text_column: text
    type: pretrain
max_steps: 1000
sequence_len: 1024
sample_packing: true
micro_batch_size: 8
gradient_accumulation_steps: 2
flash_attention: false
sdp_attention: true
bf16: full
""",
        {
            "data.train": {
                "path": "HuggingFaceFW/fineweb-edu",
                "split": "train",
                "name": "sample-10BT",
            },
            "data.format": "text",
            "data.streaming": True,
            "data.max_length": 1024,
            "train.max_steps": 1000,
            "train.per_device_train_batch_size": 8,
            "train.gradient_accumulation_steps": 2,
            "model.attn_implementation": "sdpa",
            "model.dtype": "bfloat16",
        },
    ),
    "fsdp": Shape(
        SMALL
        + """\
datasets: [{path: a/b, type: chat_template}]
fsdp: [full_shard, auto_wrap]
fsdp_config:
  fsdp_offload_params: true
  fsdp_sync_module_states: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
""",
        {
            "train.fsdp": True,
            "train.fsdp_config": {
                "offload_params": True,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
                "state_dict_type": "FULL_STATE_DICT",
                "version": 2,
            },
        },
        unchanged={"fsdp_config.fsdp_sync_module_states"},
    ),
    "schedules and evaluation": Shape(
        SMALL
        + """\
datasets: [{path: a/b, type: chat_template}]
val_set_size: 500
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
warmup_ratio: 0.05
eval_steps: 50
save_steps: 100
save_total_limit: 3
eval_batch_size: 4
load_best_model_at_end: true
early_stopping_patience: 3
neftune_noise_alpha: 5
max_grad_norm: 1.0
adam_beta2: 0.95
seed: 7
hub_model_id: us/mine
some_new_key: 3
resume_from_checkpoint: outputs/checkpoint-5
""",
        {
            "data.holdout": 500,
            "train.lr_scheduler_type": "cosine_with_min_lr",
            "train.lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "train.warmup_steps": 0.05,
            "train.eval_steps": 50,
            "train.save_steps": 100,
            "train.save_total_limit": 3,
            "train.per_device_eval_batch_size": 4,
            "train.load_best_model_at_end": True,
            "evaluation.early_stopping_patience": 3,
            "train.neftune_noise_alpha": 5,
            "train.adam_beta2": 0.95,
            "train.seed": 7,
            "train.hub_model_id": "us/mine",
            "train.push_to_hub": True,
        },
        changing={"some_new_key"},
        unchanged={"resume_from_checkpoint"},
    ),
    "a classifier": Shape(
        SMALL + "model_type: AutoModelForSequenceClassification\n"
        "datasets: [{path: a/b, type: chat_template}]\nlr_scheduler: one_cycle\n",
        {"model.task": "classification", "train.lr_scheduler_type": "cosine"},
        changing={"lr_scheduler"},
        refused=("",),
    ),
}

INFO = """{
  "mine": {"file_name": "mine.jsonl"},
  "chats": {"hf_hub_url": "a/chats", "formatting": "sharegpt", "split": "train_sft",
            "columns": {"messages": "messages", "tools": "tools"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                     "assistant_tag": "assistant"}},
  "shared": {"hf_hub_url": "a/shared", "formatting": "sharegpt"},
  "corpus": {"hf_hub_url": "a/corpus", "subset": "en", "columns": {"prompt": "text"}},
  "renamed": {"hf_hub_url": "a/renamed", "num_samples": 50,
              "columns": {"prompt": "q", "response": "a", "system": "sys", "history": "past"}},
  "pictures": {"hf_hub_url": "a/pictures", "formatting": "sharegpt",
               "columns": {"images": "images"}},
  "pairs": {"hf_hub_url": "a/pairs", "ranking": true,
            "columns": {"prompt": "question", "chosen": "chosen", "rejected": "rejected"}}
}"""
"""What `dataset_info.json` holds in these tests."""

START = "model_name_or_path: Qwen/Qwen3-0.6B\nstage: sft\ndo_train: true\n"

LLAMAFACTORY = {
    "pairs with hinge, until nothing gets better": Shape(
        START.replace("sft", "dpo")
        + """\
dataset: pairs
pref_beta: 0.3
pref_loss: hinge
loraplus_lr_ratio: 8
use_galore: false
ddp_find_unused_parameters: true
val_size: 0.1
eval_strategy: steps
eval_steps: 50
early_stopping_steps: 3
""",
        {
            "model.task": "dpo",
            "data.format": "preference",
            "dpo": {"beta": 0.3, "loss_type": ["hinge"]},
            "peft.loraplus_ratio": 8,
            "evaluation.early_stopping_patience": 3,
        },
        changing={"dataset"},
        unchanged={"ddp_find_unused_parameters"},
    ),
    "lora": Shape(
        """\
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: mine,shared
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
""",
        {
            "model.dtype": "bfloat16",
            "model.trust_remote_code": True,
            "peft": {"method": "lora", "r": 8, "alpha": 16},
            "tokenizer.chat_template": "llama3",
            "data.train": [
                {"path": "./data/mine.jsonl", "split": "train[:1000]", "format": "instruction"},
                {"path": "a/shared", "split": "train[:1000]", "format": "chat",
                 "columns": {"messages": "conversations"}},
            ],
            "data.max_length": 2048,
            "data.num_proc": 16,
            "data.holdout": 0.1,
            "train.per_device_train_batch_size": 1,
            "train.gradient_accumulation_steps": 8,
            "train.warmup_steps": 0.1,
            "train.bf16": True,
            "train.activation_checkpointing": True,
            "train.dataloader_num_workers": 4,
            "train.report_to": "none",
            "train.ddp_timeout": 180000000,
            "output.dir": "saves/llama3-8b/lora/sft",
        },
        changing={"dataset"},
        unchanged={"overwrite_cache", "plot_loss", "overwrite_output_dir", "do_train"},
    ),
    "all weights over 4 GPUs": Shape(
        START + """\
finetuning_type: full
deepspeed: ds.json
dataset: chats
template: qwen3
enable_thinking: false
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
bf16: true
disable_gradient_checkpointing: true
flash_attn: fa2
""",
        {
            "model.dtype": "float32",
            "model.attn_implementation": "flash_attention_2",
            "data.train": {"path": "a/chats", "split": "train_sft"},
            "data.format": "chat",
            "data.template_options": {"enable_thinking": False},
            "train.effective_batch_size": 16,
            "train.deepspeed": {"zero_optimization": {"stage": 2}},
        },
        changing={"template"},
        world_size=4,
    ),
    "qlora in 4 bits": Shape(
        START + """\
quantization_bit: 4
double_quantization: true
lora_rank: 16
lora_alpha: 64
lora_target: q_proj,v_proj
additional_target: embed_tokens,lm_head
dataset: renamed
template: default
fp16: true
""",
        {
            "peft": {"method": "qlora", "r": 16, "alpha": 64,
                     "target_modules": ["q_proj", "v_proj"],
                     "modules_to_save": ["embed_tokens", "lm_head"]},
            "data.train": {
                "path": "a/renamed", "split": "train[:50]",
                "columns": {"instruction": "q", "output": "a", "system": "sys", "history": "past"},
            },
            "train.fp16": True,
            "model.dtype": "float16",
        },
        changing={"template"},
        unchanged={"double_quantization"},
    ),
    "a stream of text": Shape(
        "model_name_or_path: a/m\nstage: pt\ndataset: corpus\nstreaming: true\nmax_steps: 100\n"
        "finetuning_type: full\npure_bf16: true\nbf16: true\n",
        {
            "data.train": {"path": "a/corpus", "name": "en"},
            "data.format": "text",
            "data.streaming": True,
            "train.max_steps": 100,
            "model.dtype": "bfloat16",
        },
    ),
    "packing, and prompts trained": Shape(
        START + """\
dataset: chats
neat_packing: true
packing: true
cutoff_len: 1024
train_on_prompt: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
default_system: Be kind.
""",
        {
            "data.roles_to_train": ["system", "user", "assistant"],
            "data.system": "Be kind.",
            "train.tokens_per_update": 2 * 4 * 1024 * 2,
            "train.max_tokens_per_micro_batch": 2048,
        },
        changing={"packing", "train_on_prompt"},
        world_size=2,
    ),
    "weights of a mix": Shape(
        START + "dataset: [chats, shared]\nmix_strategy: interleave_under\n"
        "interleave_probs: 0.7,0.3\nlora_rank: 8\nuse_dora: true\nuse_rslora: true\n"
        "pissa_init: true\n",
        {
            "data.mix": "first_exhausted",
            "data.format": "chat",
            "peft.method": "dora",
            "peft.options": {"use_rslora": True, "init_lora_weights": "pissa_niter_16"},
        },
    ),
    "a set that nothing explains, and pictures": Shape(
        START + "dataset: pictures,unknown_set\nfinetuning_type: freeze\n"
        "freeze_trainable_layers: 2\nuse_galore: true\nrope_scaling: linear\n"
        "run_name: second\nreport_to: [wandb, tensorboard]\n",
        {
            "wandb.name": "second",
            "train.report_to": ["wandb", "tensorboard"],
        },
        changing={"dataset", "finetuning_type", "freeze_trainable_layers", "use_galore",
                  "rope_scaling"},
    ),
    "evaluation on a set of its own": Shape(
        START + "dataset: chats\neval_dataset: renamed\neval_strategy: epoch\n"
        "mask_history: true\nweight_decay: 0.1\noptim: adamw_mini\nenable_liger_kernel: true\n",
        {
            "data.eval": [{
                "path": "a/renamed", "split": "train[:50]", "format": "instruction",
                "columns": {"instruction": "q", "output": "a", "system": "sys", "history": "past"},
            }],
            "data.assistant_turns": "last",
            "train.eval_strategy": "epoch",
            "train.weight_decay": 0.1,
            "train.use_liger_kernel": True,
        },
        changing={"optim"},
    ),
    "arguments of the stock Trainer": Shape(
        START + "dataset: chats\nfinetuning_type: full\nneftune_noise_alpha: 5\n"
        "label_smoothing_factor: 0.1\nmax_grad_norm: 0.5\nseed: 3\nlr_scheduler_type: linear\n"
        "logging_first_step: true\nwarmup_steps: 10\n",
        {
            "train.neftune_noise_alpha": 5,
            "train.label_smoothing_factor": 0.1,
            "train.max_grad_norm": 0.5,
            "train.seed": 3,
            "train.lr_scheduler_type": "linear",
            "train.logging_first_step": True,
            "train.warmup_steps": 10,
        },
    ),
}  # fmt: skip
