"""sentence-transformers: add_adapter, train, save, load, and loading an adapter onto a model."""

from .common import close, folder, sentence, tokenizer, torch

from datasets import Dataset  # isort: skip
from peft import LoraConfig, TaskType
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from transformers import BertConfig, BertModel

torch.manual_seed(0)
base = str(folder() / "base")
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
BertModel(BertConfig(**sizes, max_position_embeddings=32)).save_pretrained(base)
tokenizer().save_pretrained(base)
model = SentenceTransformer(base, device="cpu")
texts = [sentence(i) for i in range(4)]
plain = torch.tensor(model.encode(texts))
model.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4, lora_alpha=8, lora_dropout=0.1))
assert model.active_adapters() == ["default"]
data = Dataset.from_list([{"anchor": sentence(i), "positive": sentence(i + 1)} for i in range(16)])
arguments = SentenceTransformerTrainingArguments(
    str(folder() / "out"),
    max_steps=4,
    per_device_train_batch_size=4,
    learning_rate=1e-2,
    report_to="none",
    use_cpu=True,
)
SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=MultipleNegativesRankingLoss(model)).train()
trained = torch.tensor(model.encode(texts))
assert not close(trained, plain)
model.disable_adapters()
assert close(torch.tensor(model.encode(texts)), plain)
model.enable_adapters()

saved = str(folder() / "saved")
model.save_pretrained(saved)
assert close(torch.tensor(SentenceTransformer(saved, device="cpu").encode(texts)), trained)
again = SentenceTransformer(base, device="cpu")
again.load_adapter(saved)
assert close(torch.tensor(again.encode(texts)), trained)
print("done")
