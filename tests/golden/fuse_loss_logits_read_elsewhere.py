"""The model returns what it predicts, so that its logits are needed: nothing changes."""


def before(
    h: "f32[4, 4] | input:0",
    labels: "i64[4] | input:1",
    w: "f32[8, 4] | parameter:head",
    tangent_0: "f32[] | tangent:0",
):
    # forward: head
    t: "f32[4, 8]{1, 4}" = aten.t.default(w)
    mm: "f32[4, 8]" = aten.mm.default(h, t)
    # forward
    best: "i64[4]" = aten.argmax.default(mm, 1)
    softmax: "f32[4, 8]" = aten._log_softmax.default(mm, 1, False)
    nll: "(f32[], f32[])" = aten.nll_loss_forward.default(softmax, labels, None, 1, -100)
    mean: "f32[]" = nll[0]
    count: "f32[]" = nll[1]
    # backward
    d_softmax: "f32[4, 8]" = aten.nll_loss_backward.default(tangent_0, softmax, labels, None, 1, -100, count)
    d_mm: "f32[4, 8]" = aten._log_softmax_backward_data.default(d_softmax, softmax, 1, torch.float32)
    # backward: head
    d_t: "f32[8, 4]{1, 8}" = aten.t.default(d_mm)
    dw: "f32[8, 4]" = aten.mm.default(d_t, h)
    return {"output:0": mean, "output:1": best, "gradient:head": dw}


def after(
    h: "f32[4, 4] | input:0",
    labels: "i64[4] | input:1",
    w: "f32[8, 4] | parameter:head",
    tangent_0: "f32[] | tangent:0",
):
    # forward: head
    t: "f32[4, 8]{1, 4}" = aten.t.default(w)
    mm: "f32[4, 8]" = aten.mm.default(h, t)
    # forward
    best: "i64[4]" = aten.argmax.default(mm, 1)
    softmax: "f32[4, 8]" = aten._log_softmax.default(mm, 1, False)
    nll: "(f32[], f32[])" = aten.nll_loss_forward.default(softmax, labels, None, 1, -100)
    mean: "f32[]" = nll[0]
    count: "f32[]" = nll[1]
    # backward
    d_softmax: "f32[4, 8]" = aten.nll_loss_backward.default(tangent_0, softmax, labels, None, 1, -100, count)
    d_mm: "f32[4, 8]" = aten._log_softmax_backward_data.default(d_softmax, softmax, 1, torch.float32)
    # backward: head
    d_t: "f32[8, 4]{1, 8}" = aten.t.default(d_mm)
    dw: "f32[8, 4]" = aten.mm.default(d_t, h)
    return {"output:0": mean, "output:1": best, "gradient:head": dw}
