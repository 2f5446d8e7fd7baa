"""A rank in the middle: what an action reads is awaited from the beginning of the action in front of it; none crosses the turn."""


def before(
    w: "f32[4, 4] | parameter:layers.1.weight",
    expected: "f32[] | expected:0",
):
    # forward F1.0
    h: "f32[2, 4]" = geminifx.receive([2, 4], [4, 1], torch.float32, 0)
    # forward F1.0: layers.1
    y: "f32[2, 4]" = aten.mm.default(h, w)
    geminifx.send(y, 2)
    # forward F1.1
    h_1: "f32[2, 4]" = geminifx.receive([2, 4], [4, 1], torch.float32, 0)
    # forward F1.1: layers.1
    y_1: "f32[2, 4]" = aten.mm.default(h_1, w)
    geminifx.send(y_1, 2)
    # forward B1.0
    dy: "f32[2, 4]" = geminifx.receive([2, 4], [4, 1], torch.float32, 2)
    geminifx.finish_send(y, 2)
    # forward B1.0: layers.1
    ht: "f32[4, 2]{1, 4}" = aten.t.default(h)
    dw: "f32[4, 4]" = aten.mm.default(ht, dy)
    # forward
    loss: "f32[]" = geminifx.receive([], [], torch.float32, 2)
    geminifx.finish_send(y_1, 2)
    turn: "(f32[])" = yield [loss], [0]
    # backward
    tangent: "f32[]" = turn[0]
    scale: "f32[]" = aten.div.Tensor(tangent, expected)
    # backward B1.1
    dy_1: "f32[2, 4]" = geminifx.receive([2, 4], [4, 1], torch.float32, 2)
    # backward B1.1: layers.1
    ht_1: "f32[4, 2]{1, 4}" = aten.t.default(h_1)
    dw_1: "f32[4, 4]" = aten.mm.default(ht_1, dy_1)
    total: "f32[4, 4]" = aten.add_.Tensor(dw, dw_1)
    total_1: "f32[4, 4]" = aten.mul_.Tensor(total, scale)
    return {"gradient:layers.1.weight": total_1}


def after(
    w: "f32[4, 4] | parameter:layers.1.weight",
    expected: "f32[] | expected:0",
):
    # forward F1.0
    start_receive: "f32[2, 4]" = geminifx.start_receive([2, 4], [4, 1], torch.float32, 0)
    start_receive_1: "f32[2, 4]" = geminifx.start_receive([2, 4], [4, 1], torch.float32, 0)
    h_2: "f32[2, 4]" = geminifx.finish_receive(start_receive)
    # forward F1.0: layers.1
    y: "f32[2, 4]" = aten.mm.default(h_2, w)
    geminifx.send(y, 2)
    # forward F1.1
    start_receive_2: "f32[2, 4]" = geminifx.start_receive([2, 4], [4, 1], torch.float32, 2)
    h_3: "f32[2, 4]" = geminifx.finish_receive(start_receive_1)
    # forward F1.1: layers.1
    y_1: "f32[2, 4]" = aten.mm.default(h_3, w)
    geminifx.send(y_1, 2)
    # forward B1.0
    start_receive_3: "f32[]" = geminifx.start_receive([], [], torch.float32, 2)
    dy_2: "f32[2, 4]" = geminifx.finish_receive(start_receive_2)
    geminifx.finish_send(y, 2)
    # forward B1.0: layers.1
    ht: "f32[4, 2]{1, 4}" = aten.t.default(h_2)
    dw: "f32[4, 4]" = aten.mm.default(ht, dy_2)
    # forward
    loss_1: "f32[]" = geminifx.finish_receive(start_receive_3)
    geminifx.finish_send(y_1, 2)
    turn: "(f32[])" = yield [loss_1], [0]
    # backward
    start_receive_4: "f32[2, 4]" = geminifx.start_receive([2, 4], [4, 1], torch.float32, 2)
    tangent: "f32[]" = turn[0]
    scale: "f32[]" = aten.div.Tensor(tangent, expected)
    # backward B1.1
    dy_3: "f32[2, 4]" = geminifx.finish_receive(start_receive_4)
    # backward B1.1: layers.1
    ht_1: "f32[4, 2]{1, 4}" = aten.t.default(h_3)
    dw_1: "f32[4, 4]" = aten.mm.default(ht_1, dy_3)
    total: "f32[4, 4]" = aten.add_.Tensor(dw, dw_1)
    total_1: "f32[4, 4]" = aten.mul_.Tensor(total, scale)
    return {"gradient:layers.1.weight": total_1}
