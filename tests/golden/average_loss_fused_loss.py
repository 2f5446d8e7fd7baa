"""The loss in pieces has its number of tokens elsewhere among its arguments."""


def before(
    h: "f32[4, 4] | input:0",
    labels: "i64[4] | input:1",
    w: "f32[8, 4] | parameter:head",
    tangent_0: "f32[] | tangent:0",
):
    # forward
    both: "(f32[], f32[], f32[2, 4])" = geminifx.linear_cross_entropy(h, w, None, labels, 1.0, 0.0, -100, 1, 256)
    loss: "f32[]" = both[0]
    total_weight: "f32[]" = both[1]
    normalizer: "f32[2, 4]" = both[2]
    # backward
    gradients: "(f32[4, 4], f32[8, 4], f32[0])" = geminifx.linear_cross_entropy_backward(tangent_0, h, w, None, labels, total_weight, normalizer, 1.0, 0.0, -100, 1, 256, [True, True, False])
    dh: "f32[4, 4]" = gradients[0]
    dw: "f32[8, 4]" = gradients[1]
    return {"output:0": loss, "gradient:head": dw, "gradient:input:0": dh}


def after(
    h: "f32[4, 4] | input:0",
    labels: "i64[4] | input:1",
    w: "f32[8, 4] | parameter:head",
    tangent_0: "f32[] | tangent:0",
):
    # forward
    both: "(f32[], f32[], f32[2, 4])" = geminifx.linear_cross_entropy(h, w, None, labels, 1.0, 0.0, -100, 1, 256)
    loss: "f32[]" = both[0]
    total_weight: "f32[]" = both[1]
    average: "f32[]" = geminifx.average(total_weight)
    share: "f32[]" = geminifx.share(loss, total_weight, average)
    mean: "f32[]" = geminifx.average(share)
    normalizer: "f32[2, 4]" = both[2]
    # backward
    gradients: "(f32[4, 4], f32[8, 4], f32[0])" = geminifx.linear_cross_entropy_backward(tangent_0, h, w, None, labels, average, normalizer, 1.0, 0.0, -100, 1, 256, [True, True, False])
    dh: "f32[4, 4]" = gradients[0]
    dw: "f32[8, 4]" = gradients[1]
    return {"output:0": mean, "gradient:head": dw, "gradient:input:0": dh}
