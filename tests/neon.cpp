// Runs the operator for test_neon.py: its arguments from stdin, the output and the gradients to stdout.

#include "fused.cpp"

#include <cstdio>

template <class T>
std::vector<T> take(int64_t count) {
    std::vector<T> values(count);
    if (fread(values.data(), sizeof(T), count, stdin) != size_t(count)) abort();
    return values;
}

int main() {
    const auto n = take<int64_t>(8);
    const int64_t mixings = n[0], batch = n[1], patches = n[2], channels = n[3], size = batch * patches * channels;
    const auto hidden = take<int64_t>(mixings), seeds = take<int64_t>(2 * mixings);
    const auto x = take<float>(size), grad = take<float>(size);
    std::vector<std::vector<float>> parameters, gradients = {std::vector<float>(size)};
    for (int i = 0; i < mixings; i++) {
        const int64_t features = i % 2 ? channels : patches, weights = hidden[i] * features;
        for (int64_t count : {channels, channels, weights, hidden[i], weights, features})
            parameters.push_back(take<float>(count)), gradients.emplace_back(count);
    }
    std::vector<const float*> from;
    std::vector<float*> to;
    for (auto& parameter : parameters) from.push_back(parameter.data());
    for (auto& gradient : gradients) to.push_back(gradient.data());

    Chain chain = {};
    chain.x = x.data(), chain.parameters = from.data(), chain.hidden = hidden.data(), chain.seeds = seeds.data();
    chain.mixings = mixings, chain.batch = batch, chain.patches = patches, chain.channels = channels;
    chain.threshold = n[4], chain.skip = n[5], chain.tanh = n[6], chain.threads = n[7];
    std::vector<float> stream((mixings - 1) * size), output(size);
    mixing_forward(&chain, stream.data(), output.data());
    mixing_backward(&chain, stream.data(), grad.data(), to.data());

    fwrite(output.data(), sizeof(float), size, stdout);
    for (auto& gradient : gradients) fwrite(gradient.data(), sizeof(float), gradient.size(), stdout);
}
