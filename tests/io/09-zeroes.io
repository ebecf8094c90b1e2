$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
write -P 9 0 256k
write -z 64k 64k
read -P 0 64k 64k
read -P 9 0 64k
read -P 9 128k 128k
write -z 1 3
read -v 0 8
