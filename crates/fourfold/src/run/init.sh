#!/bin/busybox sh
# The first process of the default guest: devices, file systems, modules, then /main.
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root TERM=linux
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
for module in /modules/*.ko; do
    [ -e "$module" ] && insmod "$module"
done
/bin/busybox sh /main
sync
poweroff -f
