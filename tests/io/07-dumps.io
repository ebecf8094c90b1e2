$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
write -P 0x41 5 20
read -v 0 40
read -v 16 3
read -q -v 0 16
write -P 0x7e 64 16
read -v 64 16
