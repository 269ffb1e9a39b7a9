"""Retrieval: the nearest training texts of a query, for the nearest rung and for few-shot prompts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from tercet.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Embed = Callable[[Sequence[str]], "NDArray[np.float32]"]
Method = Literal["bm25", "tfidf", "characters"]
METHODS: tuple[Method, ...] = get_args(Method)

# Okapi BM25's usual parameters: Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and
# Beyond", section 3.2, give 1.2 < k1 < 2 and 0.5 < b < 0.8; Lucene's defaults are these.
K1 = 1.2
B = 0.75
CHARACTERS = (2, 4)  # lengths of the character n-grams
_CELLS = 20_000_000  # similarities that are computed at once: 160 MB

# Scripts without spaces between words: Thai and Lao, Burmese, Khmer, kana, ideographs.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]+|[^\W_{_UNSPACED}]+")
_UNSPACED_RUN = re.compile(rf"[{_UNSPACED}]")
_NO_TEXT = "\N{EMPTY SET}"  # stands for an empty text, which has no words and no n-grams


@dataclass(frozen=True)
class Neighbours:
    """The nearest texts of each query, the nearest first.

    Attributes:
        indices: of the texts, shape (queries, k).
        similarities: to the query, shape (queries, k); comparable only within one method.
    """

    indices: NDArray[np.int64]
    similarities: NDArray[np.float64]


class Retriever:
    """An index of texts that returns the nearest ones of a query.

    ``bm25`` is Okapi BM25 (Robertson & Zaragoza 2009) over words. The weight of a word is
    log(1 + (N - n + 0.5) / (n + 0.5)) for n of N texts with it, which is never negative. A similarity has no
    upper limit.

    ``tfidf`` is the cosine of TF-IDF vectors over words; ``characters`` the same over character n-grams within
    words, which also match inflected, joined and misspelt words.

    Words are case folded. A run of characters of a script that has no spaces between words counts as its
    characters and pairs of neighbouring characters. A text without words counts as its characters.

    Args:
        texts: to search.
        method: how similarity is measured.

    Raises:
        UserError: there are no texts, or the method is unknown.
    """

    def __init__(self, texts: Sequence[str], method: Method = "bm25") -> None:
        from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

        if method not in METHODS:
            raise UserError(f"retrieval method {method!r}; the methods are {', '.join(METHODS)}")
        if not texts:
            raise UserError("there are no texts to retrieve from")
        self.method, self.count = method, len(texts)
        if method == "characters":
            self._vectorizer: Any = TfidfVectorizer(
                analyzer="char_wb", ngram_range=CHARACTERS, preprocessor=_folded, sublinear_tf=True
            )
        elif method == "tfidf":
            self._vectorizer = TfidfVectorizer(analyzer=words, sublinear_tf=True)
        else:
            self._vectorizer = CountVectorizer(analyzer=words, dtype=float)
        rows = self._vectorizer.fit_transform(texts)
        self._columns: Any = (_bm25(rows) if method == "bm25" else rows).T.tocsr()

    def similarities(self, queries: Sequence[str]) -> NDArray[np.float64]:
        """Return the similarity of each query to each text, shape (queries, texts)."""
        import numpy as np

        if not queries:
            return np.zeros((0, self.count))
        product: NDArray[np.float64] = (self._vectorizer.transform(queries) @ self._columns).toarray()
        return product

    def nearest(self, queries: Sequence[str], k: int) -> Neighbours:
        """Return the ``k`` nearest texts of each query (all texts if there are fewer).

        Equally similar texts come in the order of their indices.

        Raises:
            UserError: ``k`` is below 1.
        """
        return _nearest(self.similarities, self.count, queries, k)


class EmbeddingRetriever:
    """An index of texts by the vectors that a model gives them; the nearest have the largest cosine.

    The mean of all vectors is subtracted first: the vectors of a language model share one large direction, which
    says nothing about a text (Mu & Viswanath 2018, arXiv:1702.01417).

    Args:
        texts: to search.
        embed: returns a vector for each text, [N, H].

    Raises:
        UserError: there are no texts, or the model gives no vectors.
    """

    def __init__(self, texts: Sequence[str], embed: Embed) -> None:
        if not texts:
            raise UserError("there are no texts to retrieve from")
        self.count, self._embed = len(texts), embed
        vectors = embed([text or _NO_TEXT for text in texts])
        self._mean = vectors.mean(axis=0)
        self._rows = self._centred(vectors)

    def similarities(self, queries: Sequence[str]) -> NDArray[np.float64]:
        """Return the cosine of each query to each text, shape (queries, texts)."""
        import numpy as np

        if not queries:
            return np.zeros((0, self.count))
        vectors = self._centred(self._embed([query or _NO_TEXT for query in queries]))
        product: NDArray[np.float64] = (vectors @ self._rows.T).astype(np.float64)
        return product

    def nearest(self, queries: Sequence[str], k: int) -> Neighbours:
        """Return the ``k`` nearest texts of each query, as `Retriever.nearest`."""
        return _nearest(self.similarities, self.count, queries, k)

    def _centred(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        import numpy as np

        centred = vectors - self._mean
        lengths = np.linalg.norm(centred, axis=1, keepdims=True)
        result: NDArray[np.float32] = centred / np.maximum(lengths, 1e-12)
        return result


def _nearest(
    compare: Callable[[Sequence[str]], NDArray[np.float64]], count: int, queries: Sequence[str], k: int
) -> Neighbours:
    """Return the ``k`` of ``count`` texts with the largest similarities that ``compare`` returns for the queries."""
    import numpy as np

    if k < 1:
        raise UserError(f"{k} nearest texts; take 1 or more")
    k = min(k, count)
    indices = np.zeros((len(queries), k), dtype=np.int64)
    similarities = np.zeros((len(queries), k))
    block = max(1, _CELLS // count)
    for start in range(0, len(queries), block):
        for number, row in enumerate(compare(queries[start : start + block]), start=start):
            # Sort only the texts that may be among the nearest: a tie with the last of them counts.
            candidates = np.flatnonzero(row >= np.partition(row, -k)[-k])
            order = candidates[np.argsort(-row[candidates], kind="stable")[:k]]
            indices[number], similarities[number] = order, row[order]
    return Neighbours(indices, similarities)


def words(text: str) -> list[str]:
    """Return the terms of a text: its words, and characters and pairs of them where a script has no spaces.

    Pairs of characters are how Lucene indexes Chinese and Japanese too (its CJKAnalyzer).
    """
    folded = _folded(text)
    terms: list[str] = []
    for run in _WORD.findall(folded):
        if _UNSPACED_RUN.match(run):
            terms += [*run, *(run[place : place + 2] for place in range(len(run) - 1))]
        else:
            terms.append(run)
    return terms or [character for character in folded if not character.isspace()]


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip() or _NO_TEXT


def _bm25(counts: Any) -> Any:
    """Return the BM25 weight of each term in each text, a sparse matrix of the shape of ``counts``."""
    import numpy as np

    texts, terms = counts.shape
    containing = np.bincount(counts.indices, minlength=terms)
    rarity = np.log1p((texts - containing + 0.5) / (containing + 0.5))
    lengths = np.asarray(counts.sum(axis=1)).ravel()
    saturation = K1 * (1 - B + B * lengths / lengths.mean())
    row_of = np.repeat(np.arange(texts), np.diff(counts.indptr))
    weights = counts.copy()
    weights.data = rarity[counts.indices] * counts.data / (counts.data + saturation[row_of])
    return weights
