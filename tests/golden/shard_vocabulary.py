"""Of a vocabulary that is sharded each rank looks up its own rows and has its own logits; of a token, two sums and the
largest logit are exchanged."""


def before(
    ids: "i64[6] | input:0",
    labels: "i64[6] | input:1",
    w: "f32[8, 4] | parameter:embed.weight",
    tangent_0: "f32[] | tangent:0",
):
    # forward: embed
    h: "f32[6, 4]" = aten.embedding.default(w, ids)
    # forward: head
    t: "f32[4, 8]{1, 4}" = aten.t.default(w)
    logits: "f32[6, 8]" = aten.mm.default(h, t)
    # forward
    softmax: "f32[6, 8]" = aten._log_softmax.default(logits, 1, False)
    nll: "(f32[], f32[])" = aten.nll_loss_forward.default(softmax, labels, None, 1, -100)
    mean: "f32[]" = nll[0]
    count: "f32[]" = nll[1]
    # backward
    d_softmax: "f32[6, 8]" = aten.nll_loss_backward.default(tangent_0, softmax, labels, None, 1, -100, count)
    d_logits: "f32[6, 8]" = aten._log_softmax_backward_data.default(d_softmax, softmax, 1, torch.float32)
    # backward: head
    d_t: "f32[8, 6]{1, 8}" = aten.t.default(d_logits)
    dw: "f32[8, 4]" = aten.mm.default(d_t, h)
    dh: "f32[6, 4]" = aten.mm.default(d_logits, w)
    # backward: embed
    dw2: "f32[8, 4]" = aten.embedding_dense_backward.default(dh, ids, 8, -1, False)
    # backward
    both: "f32[8, 4]" = aten.add.Tensor(dw, dw2)
    return {"output:0": mean, "output:1": logits, "gradient:embed.weight": both}


def after(
    ids: "i64[6] | input:0",
    labels: "i64[6] | input:1",
    w: "f32[4, 4] | parameter:embed.weight | on tp=S0",
    tangent_0: "f32[] | tangent:0",
):
    # forward: embed
    offset: "i64[]" = geminifx.offset(ids, 'tp', 4)
    sub: "i64[6]" = aten.sub.Tensor(ids, offset)
    lt: "b8[6]" = aten.lt.Scalar(sub, 0)
    ge: "b8[6]" = aten.ge.Scalar(sub, 4)
    logical_or: "b8[6]" = aten.logical_or.default(lt, ge)
    masked_fill: "i64[6]" = aten.masked_fill.Scalar(sub, logical_or, 0)
    embedding: "f32[6, 4]" = aten.embedding.default(w, masked_fill)
    unsqueeze: "b8[6, 1]" = aten.unsqueeze.default(logical_or, -1)
    masked_fill_1: "f32[6, 4] | on tp=P" = aten.masked_fill.Scalar(embedding, unsqueeze, 0.0)
    # forward: head
    t_1: "f32[4, 4]{1, 4} | on tp=S1" = aten.t.default(w)
    all_reduce: "f32[6, 4] | on R" = geminifx.all_reduce(masked_fill_1, 'tp', 'sum')
    mm: "f32[6, 4] | on tp=S1" = aten.mm.default(all_reduce, t_1)
    absent: "f32[0]" = geminifx.absent(mm)
    # forward
    amax: "f32[6, 1]" = aten.amax.default(mm, [1], True)
    all_reduce_1: "f32[6, 1]" = geminifx.all_reduce(amax, 'tp', 'max')
    sub_1: "f32[6, 4]" = aten.sub.Tensor(mm, all_reduce_1)
    exp: "f32[6, 4]" = aten.exp.default(sub_1)
    sum_1: "f32[6, 1]" = aten.sum.dim_IntList(exp, [1], True)
    all_reduce_2: "f32[6, 1]" = geminifx.all_reduce(sum_1, 'tp', 'sum')
    log: "f32[6, 1]" = aten.log.default(all_reduce_2)
    sub_2: "f32[6, 4] | on tp=S1" = aten.sub.Tensor(sub_1, log)
    ne: "b8[6]" = aten.ne.Scalar(labels, -100)
    offset_1: "i64[]" = geminifx.offset(labels, 'tp', 4)
    sub_3: "i64[6]" = aten.sub.Tensor(labels, offset_1)
    lt_1: "b8[6]" = aten.lt.Scalar(sub_3, 0)
    ge_1: "b8[6]" = aten.ge.Scalar(sub_3, 4)
    logical_or_1: "b8[6]" = aten.logical_or.default(lt_1, ge_1)
    masked_fill_2: "i64[6]" = aten.masked_fill.Scalar(sub_3, logical_or_1, 0)
    logical_not: "b8[6]" = aten.logical_not.default(ne)
    logical_or_2: "b8[6]" = aten.logical_or.default(logical_or_1, logical_not)
    unsqueeze_1: "i64[6, 1]" = aten.unsqueeze.default(masked_fill_2, 1)
    gather: "f32[6, 1]" = aten.gather.default(sub_2, 1, unsqueeze_1)
    squeeze: "f32[6]" = aten.squeeze.dim(gather, 1)
    masked_fill_3: "f32[6]" = aten.masked_fill.Scalar(squeeze, logical_or_2, 0.0)
    sum_2: "f32[]" = aten.sum.default(masked_fill_3)
    neg: "f32[]" = aten.neg.default(sum_2)
    all_reduce_3: "f32[]" = geminifx.all_reduce(neg, 'tp', 'sum')
    _to_copy: "f32[6]" = aten._to_copy.default(ne, dtype=torch.float32)
    sum_3: "f32[] | on R" = aten.sum.default(_to_copy)
    div: "f32[] | on R" = aten.div.Tensor(all_reduce_3, sum_3)
    # backward
    offset_2: "i64[]" = geminifx.offset(labels, 'tp', 4)
    sub_4: "i64[6]" = aten.sub.Tensor(labels, offset_2)
    lt_2: "b8[6]" = aten.lt.Scalar(sub_4, 0)
    ge_2: "b8[6]" = aten.ge.Scalar(sub_4, 4)
    logical_or_3: "b8[6]" = aten.logical_or.default(lt_2, ge_2)
    masked_fill_4: "i64[6]" = aten.masked_fill.Scalar(sub_4, logical_or_3, 0)
    eq: "b8[6]" = aten.eq.Scalar(labels, -100)
    logical_or_4: "b8[6]" = aten.logical_or.default(logical_or_3, eq)
    neg_1: "f32[]" = aten.neg.default(tangent_0)
    div_1: "f32[]" = aten.div.Tensor(neg_1, sum_3)
    expand: "f32[6]{0}" = aten.expand.default(div_1, [6])
    masked_fill_5: "f32[6]" = aten.masked_fill.Scalar(expand, logical_or_4, 0.0)
    unsqueeze_2: "i64[6, 1]" = aten.unsqueeze.default(masked_fill_4, 1)
    unsqueeze_3: "f32[6, 1]" = aten.unsqueeze.default(masked_fill_5, 1)
    zeros_like: "f32[6, 4]" = aten.zeros_like.default(sub_2)
    scatter: "f32[6, 4] | on tp=S1" = aten.scatter.src(zeros_like, 1, unsqueeze_2, unsqueeze_3)
    sum_4: "f32[6, 1]" = aten.sum.dim_IntList(scatter, [1], True)
    all_reduce_4: "f32[6, 1]" = geminifx.all_reduce(sum_4, 'tp', 'sum')
    exp_1: "f32[6, 4]" = aten.exp.default(sub_2)
    mul: "f32[6, 4]" = aten.mul.Tensor(exp_1, all_reduce_4)
    sub_5: "f32[6, 4] | on tp=S1" = aten.sub.Tensor(scatter, mul)
    # backward: head
    t_2: "f32[4, 6]{1, 4} | on tp=S0" = aten.t.default(sub_5)
    mm_1: "f32[4, 4] | on tp=S0" = aten.mm.default(t_2, all_reduce)
    mm_2: "f32[6, 4] | on tp=P" = aten.mm.default(sub_5, w)
    # backward: embed
    all_reduce_5: "f32[6, 4] | on R" = geminifx.all_reduce(mm_2, 'tp', 'sum')
    offset_3: "i64[]" = geminifx.offset(ids, 'tp', 4)
    sub_6: "i64[6]" = aten.sub.Tensor(ids, offset_3)
    lt_3: "b8[6]" = aten.lt.Scalar(sub_6, 0)
    ge_3: "b8[6]" = aten.ge.Scalar(sub_6, 4)
    logical_or_5: "b8[6]" = aten.logical_or.default(lt_3, ge_3)
    masked_fill_6: "i64[6]" = aten.masked_fill.Scalar(sub_6, logical_or_5, 0)
    unsqueeze_4: "b8[6, 1]" = aten.unsqueeze.default(logical_or_5, -1)
    masked_fill_7: "f32[6, 4]" = aten.masked_fill.Scalar(all_reduce_5, unsqueeze_4, 0.0)
    embedding_dense_backward: "f32[4, 4] | on tp=S0" = aten.embedding_dense_backward.default(masked_fill_7, masked_fill_6, 4, -1, False)
    # backward
    add: "f32[4, 4] | on tp=S0" = aten.add.Tensor(mm_1, embedding_dense_backward)
    return {"output:0": div, "output:1": absent, "gradient:embed.weight": add}
