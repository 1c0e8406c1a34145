#!/usr/bin/env bash
# Sourced: how buildah is called here, and what of the host's pip settings a build may see.

IMAGE_STATE=${IMAGE_STATE:-/var/tmp/ddpm_ema-image}

require_buildah() {
    [[ $(id -u) == 0 ]] || { echo "buildah: needs root here (chroot isolation)" >&2; exit 1; }
    command -v buildah >/dev/null || { echo "buildah: not installed, and no Docker engine answers" >&2; exit 1; }
    mkdir -p "$IMAGE_STATE"
}

# vfs copies the whole image for every layer and works everywhere; overlay is used where the kernel lets root mount one.
storage_driver() {
    local probe
    probe=$(mktemp -d "$IMAGE_STATE/probe.XXXXXX")
    mkdir "$probe/lower" "$probe/upper" "$probe/work" "$probe/merged"
    if mount -t overlay overlay -o "lowerdir=$probe/lower,upperdir=$probe/upper,workdir=$probe/work" "$probe/merged" 2>/dev/null; then
        umount "$probe/merged"
        echo overlay
    else
        echo vfs
    fi
    rm -rf --one-file-system "$probe"
}

bah() {
    : "${STORAGE_DRIVER:=$(storage_driver)}"
    buildah --storage-driver "$STORAGE_DRIVER" --root "$IMAGE_STATE/storage" --runroot "$IMAGE_STATE/run" "$@"
}

# --volume arguments, one word a line: pip's configuration files, the local folders that they name, the certificates.
host_pip_mounts() {
    local config target path
    while read -r config target; do
        if [[ -f $config ]]; then
            printf -- '--volume\n%s:%s:ro\n' "$config" "$target"
            while read -r path; do
                if [[ -d $path ]]; then printf -- '--volume\n%s:%s:ro\n' "$path" "$path"; fi
            done < <(grep -oE '(^|[ =]|file://)/[^ ]+' "$config" | sed -E 's,^[^/]*(//)?/,/,; s,/simple/?$,,')
        fi
    done <<<"/etc/pip.conf /etc/pip.conf
${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf /root/.config/pip/pip.conf
$HOME/.pip/pip.conf /root/.pip/pip.conf"
    if [[ -d /etc/ssl/certs ]]; then printf -- '--volume\n/etc/ssl/certs:/etc/ssl/certs:ro\n'; fi
}
