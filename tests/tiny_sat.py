"A SaT that a test can train in seconds: two layers, one token for each letter, taught on stories in three languages."
import random

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import PreTrainedTokenizerFast
from wtpsplit.configs import SubwordXLMConfig
from wtpsplit.models import SubwordXLMForTokenClassification

from lcm_nb.worlds.stories import StoryWorld

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZäöüßéèêàâçîïôûùœÄÖÜÉÈÀ0123456789.,!?;:'’\"“”«»()-–…▁"


def tokenizer():
    "One token for each letter, with the special tokens and the normalization of XLM-R's tokenizer"
    tokens = [("<s>", 0.), ("<pad>", 0.), ("</s>", 0.), ("<unk>", -20.)] + [(c, -3.) for c in LETTERS]
    letters = Tokenizer(models.Unigram(tokens, unk_id=3))
    letters.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", cls_token="<s>", pad_token="<pad>", eos_token="</s>", sep_token="</s>", unk_token="<unk>")


def story_texts(seed, split="train"):
    "Endless lists of sentences, each the story of one seed in one of three languages"
    world, rng = StoryWorld(), random.Random(seed)
    while True: yield world.stories(1, seed=rng.randrange(10**9), split=split)[0].tell(rng.choice(world.languages))


def window(sentences, fast, size, rng):
    "Token ids of a part of a story, and 1 where a sentence ends"
    ids, ends = [], []
    for s in sentences[rng.randrange(len(sentences)):]:
        tokens = fast(s, add_special_tokens=False)["input_ids"]
        ids += tokens
        ends += [0.]*(len(tokens) - 1) + [1.]
    short = max(0, size - len(ids))
    ids, ends = ids[:size] + [1]*short, ends[:size] + [0.]*short
    return [0, *ids, 2], [0., *ends, 0.]


def train_tiny_sat(folder, steps=260, size=112, batch=8, seed=0):
    "Train the model and save it with its tokenizer, as wtpsplit loads it"
    torch.manual_seed(seed)
    fast, texts, rng = tokenizer(), story_texts(seed), random.Random(seed)
    model = SubwordXLMForTokenClassification(SubwordXLMConfig(vocab_size=len(fast), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                                                              max_position_embeddings=514, num_labels=1, pad_token_id=1, hidden_dropout_prob=0., attention_probs_dropout_prob=0.))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        ids, ends = (torch.tensor(x) for x in zip(*[window(next(texts), fast, size, rng) for _ in range(batch)]))
        mask = (ids != 1).float()
        logits = model(input_ids=ids, attention_mask=mask)["logits"][..., 0]
        loss = binary_cross_entropy_with_logits(logits, ends, weight=mask, reduction="sum")/mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)
