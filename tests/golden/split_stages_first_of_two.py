"""The first rank of two: it runs two forwards ahead, sends what the second stage reads, and receives the loss at its turn."""


def before(
    batch: "f32[4, 4] | input:0",
    w: "f32[4, 4] | parameter:layers.0.weight",
    v: "f32[4, 4] | parameter:layers.1.weight",
    tangent: "f32[] | tangent:0",
):
    # forward
    x: "f32[2, 4]" = geminifx.microbatch(batch, 0, 2)
    # forward: layers.0
    h: "f32[2, 4]" = aten.mm.default(x, w)
    # forward: layers.1
    y: "f32[2, 4]" = aten.mm.default(h, v)
    # forward
    loss: "f32[]" = aten.mean.default(y)
    mean: "f32[]" = geminifx.average(loss)
    # backward
    share: "f32[]" = aten.div.Tensor(tangent, 2)
    dy: "f32[2, 4]{0, 0}" = aten.expand.default(share, [2, 4])
    # backward: layers.1
    ht: "f32[4, 2]{1, 4}" = aten.t.default(h)
    dv: "f32[4, 4]" = aten.mm.default(ht, dy)
    vt: "f32[4, 4]{1, 4}" = aten.t.default(v)
    dh: "f32[2, 4]" = aten.mm.default(dy, vt)
    # backward: layers.0
    xt: "f32[4, 2]{1, 4}" = aten.t.default(x)
    dw: "f32[4, 4]" = aten.mm.default(xt, dh)
    return {"output:0": mean, "gradient:layers.0.weight": dw, "gradient:layers.1.weight": dv}


def after(
    batch: "f32[4, 4] | input:0",
    w: "f32[4, 4] | parameter:layers.0.weight",
    tangent: "f32[] | tangent:0",
    expected: "f32[] | expected:0",
):
    # forward F0.0
    x_1: "f32[2, 4]" = geminifx.microbatch(batch, 0, 2)
    # forward F0.0: layers.0
    h_1: "f32[2, 4]" = aten.mm.default(x_1, w)
    geminifx.send(h_1, 1)
    # forward F0.1
    x_2: "f32[2, 4]" = geminifx.microbatch(batch, 1, 2)
    # forward F0.1: layers.0
    h_2: "f32[2, 4]" = aten.mm.default(x_2, w)
    geminifx.send(h_2, 1)
    # forward B0.0: layers.0
    xt_1: "f32[4, 2]{1, 4}" = aten.t.default(x_1)
    dh_1: "f32[2, 4]" = geminifx.receive([2, 4], [4, 1], torch.float32, 1)
    geminifx.finish_send(h_1, 1)
    dw_1: "f32[4, 4]" = aten.mm.default(xt_1, dh_1)
    total: "f32[4, 4]" = aten._to_copy.default(dw_1, dtype=torch.float32)
    # forward
    output_1: "f32[]" = geminifx.receive([], [], torch.float32, 1)
    geminifx.finish_send(h_2, 1)
    # backward
    scale: "f32[]" = aten.div.Tensor(tangent, expected)
    # backward B0.1: layers.0
    xt_2: "f32[4, 2]{1, 4}" = aten.t.default(x_2)
    dw_2: "f32[4, 4]" = aten.mm.default(xt_2, dh_1)
    total_1: "f32[4, 4]" = aten.add_.Tensor(total, dw_2)
    total_2: "f32[4, 4]" = aten.mul_.Tensor(total_1, scale)
    return {"output:0": output_1, "gradient:layers.0.weight": total_2}
