"""A tokenizer of whole words for the tiny models, and text in them."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


TEXTS = [f"w{i} w{i + 1} w{(7 * i) % 90} w{(3 * i) % 90}" for i in range(40)]


def word_tokenizer():
    """`w0` to `w95` are the ids 0 to 95."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w95"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w95", pad_token="w0")
