#!/usr/bin/env bash
# Find a Chromium for the page's tests, or install Debian's.
set -uo pipefail
for browser in chromium chromium-browser google-chrome; do
    command -v "$browser" >/dev/null && exit 0
done
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "installing chromium for the page's tests"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; } \
        >/dev/null 2>&1 && exit 0
fi
echo "NO BROWSER: the page's tests will be skipped; install chromium or Chrome to run them." >&2
