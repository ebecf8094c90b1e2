$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
write -P 1 100 1000
read -P 1 100 1000
read -P 0 0 100
read -P 0 1100 500
write -P 2 65535 2
read -P 2 65535 2
