"""One layer of vLLM at work: the pieces of all its modules in as few products as there can be."""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn


class StackedLinear(nn.Module):
    r"""Several factorized or dense modules that read the same input, as one map.

        t = x first^T,   u_k = t[:, a_k : b_k] second_k^T,   y = cat(parts of t, u_1, ..., u_K) (in order) + b

    First tables are stacked, so that all modules read the input in one product; one that several modules share stands
    there once, and their second tables are one as well. Dense weights are rows of the first table, whose outputs are
    the module's own. Shapes depend on the checkpoint only. Outputs are put in order by one gather if a module is
    pivoted, else by a concatenation.

    Args:
        pieces (`list[Piece]`): in the order of the outputs, all of one dtype and on one device.

    Shapes:
        `first` `(sum of r and of dense outputs, in)`, `seconds[k]` `(rows, r_k)`, `order` `(out,)` int64.
    """

    def __init__(self, pieces):
        super().__init__()
        tables = _distinct([piece.first for piece in pieces])
        stops = list(accumulate(len(table) for table in tables))
        self.spans = [(stop - len(table), stop) for table, stop in zip(tables, stops, strict=True)]
        index = [next(i for i, table in enumerate(tables) if table is piece.first) for piece in pieces]
        self.span_of_piece = [self.spans[i] for i in index]
        seconds, self.plan = [], []
        ordered = any(piece.order is not None for piece in pieces)
        if ordered:
            self.plan.append((0, stops[-1], None))
        for position, (piece, i) in enumerate(zip(pieces, index, strict=True)):
            if piece.second is None:
                if not ordered:
                    self.plan.append((*self.spans[i], None))
            elif position and index[position - 1] == i and pieces[position - 1].second is not None:
                seconds[-1] = torch.cat([seconds[-1], piece.second])
            else:
                self.plan.append((*self.spans[i], len(seconds)))
                seconds.append(piece.second)
        self.first = _fixed(torch.cat(tables))
        self.seconds = nn.ParameterList([_fixed(second) for second in seconds])
        order = _joint_order(pieces, self.span_of_piece).to(self.first.device) if ordered else None
        self.register_buffer("order", order)

    def table(self, position):
        """The first table of the piece at `position`."""
        start, stop = self.span_of_piece[position]
        return self.first[start:stop]

    def forward(self, x, bias=None):
        t = F.linear(x, self.first)
        parts = [
            t[..., start:stop] if k is None else F.linear(t[..., start:stop], self.seconds[k])
            for start, stop, k in self.plan
        ]
        y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        if self.order is not None:
            y = y.gather(-1, self.order.expand(*y.shape[:-1], -1))
        return y if bias is None else y + bias


def _distinct(tables):
    found = []
    for table in tables:
        if not any(table is other for other in found):
            found.append(table)
    return found


def _fixed(tensor):
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


def _joint_order(pieces, spans):
    """Where each output stands in `cat(t, u_1, ..., u_K)`."""
    done, found = max(stop for _, stop in spans), []
    for piece, (start, stop) in zip(pieces, spans, strict=True):
        rank, rows = stop - start, 0 if piece.second is None else len(piece.second)
        if piece.order is not None:
            found.append(torch.where(piece.order < rank, piece.order + start, piece.order - rank + done))
        else:
            found.append(torch.arange(*((done, done + rows) if rows else (start, stop)), device="cpu"))
        done += rows
    return torch.cat(found)
