"""The answers of encoders: vectors, labels and scores, in OpenAI's, vLLM's and text-embeddings-inference's forms."""

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from tasks.call import Call
from tasks.identity import Identity, usage_of

if TYPE_CHECKING:
    import numpy as np


def embedded(identity: Identity, call: Call, vectors: "np.ndarray") -> bytes:
    """One vector per text."""
    body: Any = list(vectors) if identity.endpoint == "/embed" else _embeddings(identity, call, vectors)
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def classified(identity: Identity, call: Call, probabilities: "np.ndarray", labels: Sequence[str]) -> bytes:
    """Every label's probability per text."""
    shape = _predictions if identity.endpoint == "/predict" else _classes
    return orjson.dumps(shape(identity, call, probabilities, labels), option=orjson.OPT_SERIALIZE_NUMPY)


def scored(identity: Identity, call: Call, scores: "Sequence[float] | np.ndarray") -> bytes:
    """How relevant each document is to its query."""
    return orjson.dumps(_SCORED[identity.endpoint](identity, call, [float(score) for score in scores]))


def _embeddings(identity: Identity, call: Call, vectors: "np.ndarray") -> dict[str, Any]:
    """OpenAI's list; base64 is little-endian float32."""
    if call.format.get("encoding_format") == "base64":
        values: list[Any] = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
    else:
        values = list(vectors)
    data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]
    return {"object": "list", "data": data, "model": identity.model, "usage": usage_of(call)}


def _classes(identity: Identity, call: Call, probabilities: "np.ndarray", labels: Sequence[str]) -> dict[str, Any]:
    """vLLM's: the best label and every probability, in the order of the model's labels."""
    data = [
        {"index": index, "label": labels[int(row.argmax())], "probs": row, "num_classes": len(row)}
        for index, row in enumerate(probabilities)
    ]
    return {**identity.head("list"), "data": data, "usage": usage_of(call)}


def _predictions(identity: Identity, call: Call, probabilities: "np.ndarray", labels: Sequence[str]) -> list[Any]:
    """text-embeddings-inference's: labels by falling score; a list of such lists unless one text was asked for."""
    lists = []
    for row in probabilities:
        order = sorted(range(len(row)), key=lambda label: (-float(row[label]), label))
        lists.append([{"score": float(row[label]), "label": labels[label]} for label in order])
    return lists[0] if call.format.get("is_single") else lists


def _by_relevance(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


def _reranked(identity: Identity, call: Call, scores: Sequence[float]) -> dict[str, Any]:
    """vLLM's: documents by falling relevance, `top_n` of them."""
    results = []
    for index in _by_relevance(scores)[: call.format.get("top_n") or None]:
        result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
        if call.format.get("return_documents"):
            result["document"] = {"text": call.inputs[index + 1]}
        results.append(result)
    return {"id": identity.id, "model": identity.model, "usage": usage_of(call), "results": results}


def _ranks(identity: Identity, call: Call, scores: Sequence[float]) -> list[dict[str, Any]]:
    """text-embeddings-inference's: texts by falling relevance."""
    ranks = []
    for index in _by_relevance(scores):
        rank: dict[str, Any] = {"index": index, "score": scores[index]}
        if call.format.get("return_documents"):
            rank["text"] = call.inputs[index + 1]
        ranks.append(rank)
    return ranks


def _pair_scores(identity: Identity, call: Call, scores: Sequence[float]) -> dict[str, Any]:
    """vLLM's: a score per pair, in the order of the request."""
    data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
    return {**identity.head("list"), "data": data, "usage": usage_of(call)}


_SCORED: Mapping[str, Callable[[Identity, Call, Sequence[float]], Any]] = {
    "/v1/rerank": _reranked,
    "/v1/score": _pair_scores,
    "/rerank": _ranks,
}
